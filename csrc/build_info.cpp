// What the library was built with, as one JSON string, which moe_ext/_load.py finds in the
// file before it dares to load the library; and the GPUs among it, for an error's text.
// setup.py writes build_info.h at every build; it names the commit, so this file is
// recompiled often and includes nothing else.

#include "build_info.h"

namespace moe_ext {

extern const char build_info[], built_for[];
const char build_info[] = "moe_ext build info: " MOE_EXT_BUILD_INFO;
const char built_for[] = MOE_EXT_BUILT_FOR;

}  // namespace moe_ext
