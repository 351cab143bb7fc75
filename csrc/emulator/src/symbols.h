#pragma once
#include <string>

namespace cuemu {

std::string symbol_name(const void* function);  // empty where it is not known

}  // namespace cuemu
