// CUEMU_PERF=1: shared-memory wavefronts and global sectors per source line, against the least
// possible. Scalar accesses are an upper bound: nvcc may make vectors of them.
#ifdef CUEMU_CHECK
#include <map>
#include <unordered_map>

#include "check.h"

namespace cuemu {
namespace {

struct Request {  // one instruction of a warp
  uint32_t lanes = 0;
  const void* at[32];
};
struct Site {
  uint32_t executed[32] = {};  // by lane: the n-th time of all lanes is one request
  std::map<uint32_t, Request> open;
  size_t bytes;
  bool write, shared;
};
struct Count {
  unsigned long long requests = 0, least = 0, needed = 0;
  size_t bytes;
  bool write, shared;
};

bool counting;
std::unordered_map<uint64_t, Site> sites[32];  // by warp
std::map<const void*, Count> counts;           // by instruction

void count_wavefronts(Count& count, const Site& site, const Request& request) {
  const int lanes = site.bytes <= 4 ? 32 : site.bytes == 8 ? 16 : 8;  // served together
  for (int first = 0; first < 32; first += lanes) {
    std::map<int, std::map<uintptr_t, int>> words_of_bank;
    for (int l = first; l < first + lanes; l++) {
      if (!(request.lanes >> l & 1)) continue;
      const auto address = reinterpret_cast<uintptr_t>(request.at[l]);
      for (uintptr_t w = address / 4; w <= (address + site.bytes - 1) / 4; w++)
        words_of_bank[w & 31][w]++;
    }
    size_t worst = 0;
    for (const auto& [bank, words] : words_of_bank) worst = std::max(worst, words.size());
    count.least += worst > 0;
    count.needed += worst;
  }
}

void count_sectors(Count& count, const Site& site, const Request& request) {
  std::map<uintptr_t, int> sectors;
  size_t lanes = 0;
  for (int l = 0; l < 32; l++) {
    if (!(request.lanes >> l & 1)) continue;
    lanes++;
    const auto address = reinterpret_cast<uintptr_t>(request.at[l]);
    for (uintptr_t s = address / 32; s <= (address + site.bytes - 1) / 32; s++) sectors[s]++;
  }
  count.needed += sectors.size();
  count.least += (lanes * site.bytes + 31) / 32;
}

void count_request(const void* pc, const Site& site, const Request& request) {
  Count& count = counts[pc];
  count.bytes = site.bytes;
  count.write = site.write;
  count.shared = site.shared;
  count.requests++;
  site.shared ? count_wavefronts(count, site, request) : count_sectors(count, site, request);
}

}  // namespace

void perf_launch() { counting = setting("CUEMU_PERF", 0); }

void perf_block() {  // what lanes executed without the others
  for (auto& of_warp : sites) {
    for (const auto& [key, site] : of_warp)
      for (const auto& [turn, request] : site.open)
        count_request(reinterpret_cast<const void*>(key >> 1), site, request);
    of_warp.clear();
  }
}

void count_access(const void* p, size_t bytes, bool write, bool shared, const void* pc) {
  if (!counting || bytes > 16) return;
  Site& site = sites[self->warp][reinterpret_cast<uint64_t>(pc) << 1 | write];
  site.bytes = bytes;
  site.write = write;
  site.shared = shared;
  const uint32_t turn = site.executed[self->lane]++;
  Request& request = site.open[turn];
  request.lanes |= 1u << self->lane;
  request.at[self->lane] = p;
  if (request.lanes != ~0u) return;
  count_request(pc, site, request);
  site.open.erase(turn);
}

}  // namespace cuemu

using namespace cuemu;

extern "C" const char* cuemu_perf_report() {  // since the last one
  perf_block();
  std::map<std::string, Count> lines;
  for (const auto& [pc, count] : counts) {
    char kind[64];
    snprintf(kind, sizeof kind, " %-6s %-5s %2zu bytes", count.shared ? "shared" : "global",
             count.write ? "write" : "read", count.bytes);
    Count& line = lines[source_line(pc) + kind];
    line.shared = count.shared;
    line.requests += count.requests;
    line.least += count.least;
    line.needed += count.needed;
  }
  static std::string text;
  text.clear();
  for (const auto& [name, count] : lines) {
    char line[200];
    snprintf(line, sizeof line, "%-52s requests %8llu  %s per ideal %.2f\n", name.c_str(),
             count.requests, count.shared ? "wavefronts" : "sectors   ",
             static_cast<double>(count.needed) / count.least);
    text += line;
  }
  counts.clear();
  return text.c_str();
}
#endif
