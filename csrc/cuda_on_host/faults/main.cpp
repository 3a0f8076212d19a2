// faults NAME right|wrong: runs the right kernel or the one with the fault. The exit status says whether the result was
// right; a sanitizer or the runner may end the program before that.
#include <cstdio>
#include <cstring>

#include "fault.h"

namespace {

std::vector<const Fault*>& all() {
  static std::vector<const Fault*> faults;
  return faults;
}

}  // namespace

Fault::Fault(const char* fault, bool (*run_right)(), bool (*run_wrong)())
    : name(fault), right(run_right), wrong(run_wrong) {
  all().push_back(this);
}

int main(int argc, char** argv) {
  for (const Fault* fault : all()) {
    if (argc != 3 || std::strcmp(argv[1], fault->name) != 0) continue;
    const bool right = std::strcmp(argv[2], "right") == 0 ? fault->right() : fault->wrong();
    std::puts(right ? "right result" : "wrong result");
    return right ? 0 : 1;
  }
  std::fputs("usage: faults NAME right|wrong\n", stderr);
  return 2;
}
