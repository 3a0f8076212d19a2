// What g++ 11 and later take from glibc above 2.28 and from libstdc++ above 3.4.24, for libraries that
// run on systems with those (manylinux_2_28). Only built with -DRISKMAP_PORTABLE=ON, on x86-64 Linux;
// the linker sends calls of log and pthread_once here (--wrap).
#include <pthread.h>

#include <new>
#include <sstream>

namespace std {

// GLIBCXX_3.4.29; weak for a library that has a libstdc++ of its own
__attribute__((weak)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GLIBCXX_3.4.26
template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();

}  // namespace std

extern "C" {

// GLIBC_2.32; "count references atomically" is right with any number of threads
__attribute__((visibility("hidden"))) char never_single_threaded __asm__("__libc_single_threaded") = 0;

// GLIBC_2.29; the same logarithm, but for errno
double log_of_glibc_2_2_5(double x);
__asm__(".symver log_of_glibc_2_2_5, log@GLIBC_2.2.5");
__attribute__((visibility("hidden"))) double __wrap_log(double x) { return log_of_glibc_2_2_5(x); }

// GLIBC_2.34, which moved it from libpthread
int pthread_once_of_glibc_2_2_5(pthread_once_t* control, void (*init)());
__asm__(".symver pthread_once_of_glibc_2_2_5, pthread_once@GLIBC_2.2.5");
__attribute__((visibility("hidden"))) int __wrap_pthread_once(pthread_once_t* control, void (*init)()) {
  return pthread_once_of_glibc_2_2_5(control, init);
}

}  // extern "C"
