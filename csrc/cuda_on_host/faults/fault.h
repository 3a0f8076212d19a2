// Each file of this folder holds a kernel with a fault and its right twin, to show what catches the fault.
#pragma once

#include <cuda_runtime.h>

#include <vector>

// Registers itself; the functions say whether the result was right.
struct Fault {
  Fault(const char* name, bool (*right)(), bool (*wrong)());

  const char* name;
  bool (*right)();
  bool (*wrong)();
};
