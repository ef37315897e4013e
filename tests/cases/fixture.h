/* A case with its data: private to generate.c (makes it) and verify.c (runs and judges it).
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FKDA_CASES_FIXTURE_H
#define FKDA_CASES_FIXTURE_H

#include "cases.h"

/* Guards and gaps hold POISON bytes, which read as NaN in every floating-point type and as -1 in
 * integers. */
enum { FKDA_POISON = 0xFF, FKDA_MAX_BUFFERS = FKDA_FIELDS };

typedef struct fkda_buffer {
  size_t offset;         /* of the first byte past the leading guard */
  size_t extent;         /* bytes between the guards */
  size_t bytes;          /* with guards */
  unsigned char *before; /* host image as it is before every call */
  unsigned char *after;  /* host image of what the last call left */
  unsigned char *base;   /* host image after the judged call, what claims compare with */
  unsigned char *device;
} fkda_buffer;

struct fkda_fixture {
  const fkda_case *c;
  const fkda_memory *memory;
  fkda_call host;   /* data pointers into `before` */
  fkda_call device; /* data pointers into `device` */
  fkda_buffer buffers[FKDA_MAX_BUFFERS];
  int buffer_count;
  int buffer_of[FKDA_FIELDS];
  int64_t *begins;  /* [N+1] rows of sequences (b*T + t) */
  int64_t *lengths; /* [N] */
  bool *skipped;    /* [N] */
  /* Which leading-dimension units (rows of out, slots of states) a correct call writes. */
  unsigned char *written[FKDA_FIELDS];
  int64_t units[FKDA_FIELDS];
  double *gold[FKDA_FIELDS];
  bool have_gold;
};

/* The same tensor in another image of its buffer. */
fkda_tensor fkda_fixture_view(const fkda_fixture *f, fkda_field field, unsigned char *image);

#endif
