/* Runs a fuzz target over the files of a seed corpus, for builds without libFuzzer.
 *
 * SPDX-License-Identifier: MIT
 */
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The buffer is exactly as large as the file, so that a sanitizer sees every byte read past its end. */
static int run_file(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) {
    (void)fprintf(stderr, "%s: %s\n", path, strerror(errno));
    return 1;
  }
  int failed = 1;
  uint8_t *data = NULL;
  long size = -1;
  if (fseek(file, 0, SEEK_END) == 0) size = ftell(file);
  if (size >= 0 && fseek(file, 0, SEEK_SET) == 0) data = malloc(size ? (size_t)size : 1);
  if (data && fread(data, 1, (size_t)size, file) == (size_t)size) {
    (void)LLVMFuzzerTestOneInput(data, (size_t)size);
    failed = 0;
  }
  if (failed) (void)fprintf(stderr, "%s: cannot be read\n", path);
  free(data);
  (void)fclose(file);
  return failed;
}

int main(int argc, char **argv) {
  int files = 0;
  int failed = 0;
  for (int i = 1; i < argc; ++i) {
    DIR *dir = opendir(argv[i]);
    if (!dir) {
      (void)fprintf(stderr, "%s: %s\n", argv[i], strerror(errno));
      return 1;
    }
    for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
      char path[PATH_MAX];
      if (entry->d_name[0] == '.') continue;
      (void)snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
      failed += run_file(path);
      ++files;
    }
    (void)closedir(dir);
  }
  printf("%d files, %d could not be read\n", files, failed);
  return failed > 0 || files == 0;
}
