// The mangled name of a kernel, from its address. dladdr knows exported symbols only, and kernels
// stand in unnamed namespaces: the library's own symbol table is read.
#include "symbols.h"

#include <dlfcn.h>
#include <elf.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

namespace cuemu {
namespace {

using Names = std::map<uint64_t, std::string>;  // by offset from where the library is loaded

Names read_symbols(const char* path) {
  std::vector<char> file;
  if (FILE* f = fopen(path, "rb")) {
    char part[1 << 16];
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;)
      file.insert(file.end(), part, part + n);
    fclose(f);
  }
  Names names;
  if (file.size() < sizeof(Elf64_Ehdr)) return names;
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* strings = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); k++) {
      if (ELF64_ST_TYPE(symbols[k].st_info) == STT_FUNC && symbols[k].st_value)
        names[symbols[k].st_value] = strings + symbols[k].st_name;
    }
  }
  return names;
}

}  // namespace

std::string symbol_name(const void* function) {
  static std::map<std::string, Names> libraries;
  Dl_info library;
  if (!dladdr(function, &library)) return {};
  auto found = libraries.find(library.dli_fname);
  if (found == libraries.end())
    found = libraries.emplace(library.dli_fname, read_symbols(library.dli_fname)).first;
  const auto name = found->second.find((const char*)function - (const char*)library.dli_fbase);
  return name == found->second.end() ? std::string() : name->second;
}

}  // namespace cuemu
