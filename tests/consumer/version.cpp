// The header from C++: the argument structs are started, and the library that was linked is this one.
#include <flashkda/flashkda.h>

#include <cstdio>
#include <cstring>

int main() {
  const fkda_prefill_args prefill = FKDA_PREFILL_ARGS_INIT;
  const fkda_decode_args decode = FKDA_DECODE_ARGS_INIT;
  if (prefill.struct_size != sizeof prefill || prefill.op != FKDA_OP_PREFILL) return 1;
  if (decode.write_state != 1 || decode.lower_bound != -5) return 1;
  const int version =
      FKDA_VERSION_MAJOR * 10000 + FKDA_VERSION_MINOR * 100 + FKDA_VERSION_PATCH;
  if (fkda_version() != version) return 1;
  if (std::strcmp(fkda_status_string(FKDA_OK), "success") != 0) return 1;
  std::printf("%s\n", fkda_version_string());
  return 0;
}
