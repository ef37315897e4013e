#include "flashkda/flashkda.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

int32_t fkda_version(void) {
  return FKDA_VERSION_MAJOR * 10000 + FKDA_VERSION_MINOR * 100 + FKDA_VERSION_PATCH;
}

const char *fkda_version_string(void) {
  return TEXT(FKDA_VERSION_MAJOR) "." TEXT(FKDA_VERSION_MINOR) "." TEXT(FKDA_VERSION_PATCH);
}
