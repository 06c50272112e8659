// What the library was built with, as one JSON string. moe_ext/_load.py finds it in the
// file before it dares to load the library. setup.py writes build_info.h at every build;
// it names the commit, so this file is recompiled often and includes nothing else.

#include "build_info.h"

namespace moe_ext {

extern const char build_info[];
const char build_info[] = "moe_ext build info: " MOE_EXT_BUILD_INFO;

}  // namespace moe_ext
