// What the compiled library and phatgoose/ops/cpu/backend.py agree on. Row-major, rows without gaps.
#pragma once

#include <stdint.h>

// What has been asked of the disk ahead of time, by all sites of a process.
struct Prefetch {
    int64_t limit;   // bytes that surely stay in memory once they were read
    int64_t bytes;   // asked for in this epoch
    uint32_t epoch;  // begins anew after `limit` bytes: what was read in an earlier one may be gone again
};

// One module, prepared once.
struct Site {
    int64_t d_in, d_out, experts, top_k;
    const float* gates;   // [E, d_in] standardised; null: choices are given
    const int8_t* codes;  // [⌈E/16⌉, d_in, 16], blocks of 16 gates side by side
    const float* step;    // [E]
    const float* sum;     // [E] Σ codes
    const float* lost;    // [E] ‖gate − step · codes‖
    const void* a;        // [R, d_in]
    const void* b;        // [R, d_out]
    const int32_t* starts;  // [E] an expert's first row
    const int32_t* ranks;   // [E]
    const float* scales;    // [E]
    int64_t kind;           // of a and b: 0 float32, 1 bfloat16
    Prefetch* prefetch;     // null: a and b are in memory
    uint32_t* fetched;      // [E] the epoch in which an expert's rows were asked for last
};

struct Call {
    const void* u;  // [N, d_in]
    const void* y;  // [N, d_out]
    void* out;      // [N, d_out], may be y; null: only choose
    int64_t tokens;
    int64_t* chosen;  // [N, k] given, below 0 nothing; or written where there are gates; null: not asked for
    float* weights;   // [N, k] likewise
    int64_t u_kind, y_kind;  // 0 float32, 1 bfloat16
};
