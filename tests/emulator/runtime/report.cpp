// What is said when something is wrong: the kernel, the block, the thread, the line. A grid
// in which a fault was found is abandoned, and launch_grid throws what was said.

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <stdexcept>

#include "block.h"

namespace emulator {

static std::string output_of(const std::string& command) {
  std::string text;
  char buffer[512];
  if (FILE* pipe = popen(command.c_str(), "r")) {
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) text.append(buffer, n);
    pclose(pipe);
  }
  return text;
}

// "kernel [file.cu:12] <- caller [..]", as addr2line says.
static std::string look_up(void* call_site) {
  Dl_info library{};
  if (!dladdr(call_site, &library) || !library.dli_fname) return "(unknown)";
  const auto offset = static_cast<char*>(call_site) - static_cast<char*>(library.dli_fbase) - 1;
  char number[32];
  snprintf(number, sizeof number, "0x%lx", static_cast<unsigned long>(offset));
  const std::string lines = output_of(std::string("addr2line -sCpfie '") + library.dli_fname +
                                      "' " + number + " 2>/dev/null");
  std::string place;
  int frames = 0;
  for (size_t begin = 0; begin < lines.size() && frames < 4; ++frames) {
    const size_t end = lines.find('\n', begin);
    std::string line = lines.substr(begin, end - begin);
    begin = end == std::string::npos ? lines.size() : end + 1;
    if (line.rfind(" (inlined by) ", 0) == 0) line.erase(0, 14);
    const std::string anonymous = "(anonymous namespace)::";
    for (size_t found; (found = line.find(anonymous)) != std::string::npos;)
      line.erase(found, anonymous.size());
    line.resize(std::min(line.size(), line.find(" (discriminator")));
    const size_t at = line.rfind(" at ");
    const std::string function = line.substr(0, std::min(at, line.find('(')));
    place += (frames ? " <- " : "") + function;
    if (at != std::string::npos) place += " [" + line.substr(at + 4) + "]";
  }
  return place.empty() ? std::string("(no debug information)") : place;
}

std::string place_of(void* call_site) {
  static auto& known = *new std::map<void*, std::string>;
  if (!call_site) return "(unknown)";
  std::string& place = known[call_site];
  if (place.empty()) place = look_up(call_site);
  return place;
}

// A compiler may copy one line of a kernel to several places.
bool same_place(void* a, void* b) { return a == b || place_of(a) == place_of(b); }

void abandon_grid(std::string message) {
  Block& b = *block;
  b.launch->error = std::move(message);
  current = nullptr;
  void* never_resumed;
  emulator_switch_stack(&never_resumed, b.grid_stack_pointer);
  __builtin_unreachable();
}

[[noreturn]] static void report(void* call_site, const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  if (!current) throw std::runtime_error(std::string("emulator: ") + text);
  char thread[256];
  const uint3 b = block->index, t = current->index;
  snprintf(thread, sizeof thread,
           "emulator: kernel %s, block (%u,%u,%u), thread (%u,%u,%u): ", block->launch->name, b.x,
           b.y, b.z, t.x, t.y, t.z);
  abandon_grid(std::string(thread) + text + (call_site ? ", at " + place_of(call_site) : ""));
}

void fail_at(void* call_site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(call_site, format, arguments);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(nullptr, format, arguments);
}

void trap() { fail_at(EMULATOR_CALL_SITE, "__trap()"); }

}  // namespace emulator
