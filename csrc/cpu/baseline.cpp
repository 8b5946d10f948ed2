// The loops for what every CPU of the architecture can do (x86-64: SSE2; arm64: NEON).
#define FIUN_ISA baseline
#define FIUN_ISA_NAME "baseline"
#include "loops.h"
