/* Execute CPUID instructions at given addresses without the bits of AVX and later extensions. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))
#define BREAKPOINT 0xcc

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX], a = leaf, b, c = part, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (leaf == 1) c &= ~(BIT(28) | BIT(12) | BIT(29)); /* AVX, FMA, F16C */
  if (leaf == 7 && part == 0) {
    b &= ~(BIT(5) | BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31)); /* AVX2, AVX512 */
    c &= ~(BIT(1) | BIT(6) | BIT(9) | BIT(10) | BIT(11) | BIT(12) | BIT(14));   /* VBMI, VNNI */
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));   /* FP16, AMX */
  }
  if (leaf == 7 && part == 1) a &= ~(BIT(4) | BIT(5)); /* AVX-VNNI, BF16 */
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 1; /* past the second byte of the instruction, 0f a2 */
}

/* 0, or 1 where a place holds no CPUID or its memory cannot be written. */
int hide_avx(uint8_t **places, int count) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO};
  uintptr_t page = sysconf(_SC_PAGESIZE);
  sigaction(SIGTRAP, &action, 0);
  for (int i = 0; i < count; i++) {
    uint8_t *place = places[i], *start = (uint8_t *)((uintptr_t)place & ~(page - 1));
    if (place[0] != 0x0f || place[1] != 0xa2) return 1;
    if (mprotect(start, page, PROT_READ | PROT_WRITE | PROT_EXEC)) return 1;
    *place = BREAKPOINT;
    if (mprotect(start, page, PROT_READ | PROT_EXEC)) return 1;
  }
  return 0;
}
