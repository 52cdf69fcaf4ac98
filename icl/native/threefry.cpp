// Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): the words of icl.streams.threefry2x32 in loops that vectorise,
// and the exact steps of Box and Muller's transform, before and after PyTorch's functions.

#include <cstdint>

struct Words {
    uint32_t first, second;
};

static inline Words threefry(const uint32_t* keys, uint32_t step, uint32_t position) {
    const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    uint32_t x0 = step + keys[0], x1 = position + keys[1];
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
    return {x0, x1};
}

// words (2, count): the two output words of key (key0, key1) at the counters (step, start), ..., (step, start + count - 1).
extern "C" void threefry_words(
    uint32_t key0, uint32_t key1, uint32_t step, int64_t start, int64_t count, uint32_t* __restrict words) {
    const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
    for (int64_t i = 0; i < count; i++) {
        const Words pair = threefry(keys, step, uint32_t(start + i));
        words[i] = pair.first;
        words[count + i] = pair.second;
    }
}

// first, second (members, steps, count): the words of each key, a row of keys (members, 2), at each step.
extern "C" void threefry_many(
    int64_t members, const uint32_t* keys, int64_t steps, const uint32_t* numbers, int64_t count, uint32_t* __restrict first,
    uint32_t* __restrict second) {
    for (int64_t member = 0; member < members; member++) {
        const uint32_t key0 = keys[2 * member], key1 = keys[2 * member + 1];
        const uint32_t all[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
        for (int64_t step = 0; step < steps; step++, first += count, second += count) {
            for (int64_t i = 0; i < count; i++) {
                const Words pair = threefry(all, numbers[step], uint32_t(i));
                first[i] = pair.first;
                second[i] = pair.second;
            }
        }
    }
}

static inline float unit_interval(uint32_t word) { return (float(int32_t(word >> 8)) + 0.5f) * 0x1p-24f; }

// uniform (2, count): the words at the counters (step, start), ..., the first as a number in (0, 1), the second as an
// angle in (0, 2 pi).
extern "C" void threefry_polar(
    uint32_t key0, uint32_t key1, uint32_t step, int64_t start, int64_t count, float* __restrict uniform) {
    const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
    for (int64_t i = 0; i < count; i++) {
        const Words pair = threefry(keys, step, uint32_t(start + i));
        uniform[i] = unit_interval(pair.first);
        uniform[count + i] = 6.283185307179586f * unit_interval(pair.second);
    }
}

// normals (2 count): neighbours radius cos and radius sin.
extern "C" void interleave(int64_t count, const float* __restrict radius, const float* __restrict cosine,
                           const float* __restrict sine, float* __restrict normals) {
    for (int64_t i = 0; i < count; i++) {
        normals[2 * i] = radius[i] * cosine[i];
        normals[2 * i + 1] = radius[i] * sine[i];
    }
}
