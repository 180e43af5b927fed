// Which instruction set this translation unit is compiled for, and how its entry points are named.
//
// Every kernel file is compiled once for each instruction set (see build.py) into one library. All of its code lives in
// `namespace hymba::HYMBA_ISA`, so that no function of one copy is merged with that of another, and its entry points
// carry the instruction set as a suffix: hymba_<name>_<isa>. The loader (ops/library.py) picks the suffix when it runs.
//
// For the same reason a kernel file uses no templates of the standard library (no std::vector, no std::sort): the linker
// keeps one copy of those, and it could be one that this processor cannot run. Scratch memory comes from threads.h.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AMX_TILE__) || defined(__AMXTILE__)  // GCC and Clang, Clang before 16
#define HYMBA_AMX 1  // matrix tiles for bf16 and int8
#define HYMBA_ISA amx  // and all of avx512_bf16
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define HYMBA_ISA avx512_bf16
#elif defined(__AVX512F__)
#define HYMBA_ISA avx512
#elif defined(__AVX2__)
#define HYMBA_ISA avx2
#else
#define HYMBA_ISA baseline  // SSE2 on x86-64, NEON on aarch64, whatever the compiler makes of it elsewhere
#endif

#define HYMBA_JOIN2(name, isa) hymba_##name##_##isa
#define HYMBA_JOIN(name, isa) HYMBA_JOIN2(name, isa)

// HYMBA_KERNEL(scan_forward)(const ScanArgs* a) { ... }  defines the C function hymba_scan_forward_<isa>.
// Each entry point takes one struct of 8-byte fields (pointers, int64_t, double), which Python packs with `struct`.
#define HYMBA_KERNEL(name) extern "C" __attribute__((visibility("default"))) void HYMBA_JOIN(name, HYMBA_ISA)

// the type of elements in memory: as `hymba.ops.library.DTYPES`
namespace hymba {
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1 };
struct bf16 {
  uint16_t bits;
};
}  // namespace hymba
