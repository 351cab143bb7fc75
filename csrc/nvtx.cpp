#include "nvtx.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

#include <cstdint>
#include <string_view>

namespace restore_ext::nvtx {
namespace {

constexpr std::string_view kStages[] = {"score", "match", "select", "merge", "attend", "plan"};

// The stage that a verb belongs to, counted from 1; 0 is none.
uint32_t category(std::string_view name) {
  std::string_view verb = name.substr(0, name.find('_'));
  if (verb == "assign") verb = "match";
  if (verb == "calibrated") verb = "attend";
  for (uint32_t i = 0; i < std::size(kStages); ++i) {
    if (kStages[i] == verb) return i + 1;
  }
  return 0;
}

// Null where no profiler is attached: NVTX looks for one once, when it is first called.
nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = [] {
    const nvtxDomainHandle_t made = nvtxDomainCreateA("restore_ext");
    for (uint32_t i = 0; made != nullptr && i < std::size(kStages); ++i) {
      nvtxDomainNameCategoryA(made, i + 1, kStages[i].data());
    }
    return made;
  }();
  return handle;
}

}  // namespace

bool built_in() { return true; }

void push(const char* name) {
  if (domain() == nullptr) return;
  nvtxEventAttributes_t range{};
  range.version = NVTX_VERSION;
  range.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  range.category = category(name);
  range.messageType = NVTX_MESSAGE_TYPE_ASCII;
  range.message.ascii = name;
  nvtxDomainRangePushEx(domain(), &range);
}

void pop() {
  if (domain() != nullptr) nvtxDomainRangePop(domain());
}

}  // namespace restore_ext::nvtx

#else

namespace restore_ext::nvtx {

bool built_in() { return false; }
void push(const char*) {}
void pop() {}

}  // namespace restore_ext::nvtx

#endif
