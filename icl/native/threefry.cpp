// Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): the words of icl.streams.threefry2x32 in one loop that
// vectorises.

#include <cstdint>

// words (2, count): the two output words of key (key0, key1) at the counters (step, 0), ..., (step, count - 1).
extern "C" void threefry_words(uint32_t key0, uint32_t key1, uint32_t step, int64_t count, uint32_t* __restrict words) {
    const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
    const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    for (int64_t i = 0; i < count; i++) {
        uint32_t x0 = step + key0, x1 = uint32_t(i) + key1;
#pragma GCC unroll 5
        for (uint32_t group = 0; group < 5; group++) {
#pragma GCC unroll 4
            for (int round = 0; round < 4; round++) {
                const int rotation = rotations[group % 2][round];
                x0 += x1;
                x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0;
            }
            x0 += keys[(group + 1) % 3];
            x1 += keys[(group + 2) % 3] + group + 1;
        }
        words[i] = x0;
        words[count + i] = x1;
    }
}
