// One step of icl.sampling.langevin in one pass over the weights. Every product and sum is rounded by itself, in PyTorch's
// order, so that the bits are those of the PyTorch code: no fused multiply-adds.

#include <cstdint>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

// `count` coordinates of `chains` chains. Strides are those from chain to chain. The results may be the positions and momenta themselves.
extern "C" void langevin_step(
    int64_t chains, int64_t count, float nbeta, float gamma, float decay, const float* time, const float* keep,
    const float* rough, const float* positions, int64_t position_stride, const float* anchors, int64_t anchor_stride,
    const float* gradients, int64_t gradient_stride, const float* noises, int64_t noise_stride, const float* momenta,
    int64_t momentum_stride, float* new_positions, int64_t new_position_stride, float* new_momenta, int64_t new_momentum_stride) {
    for (int64_t chain = 0; chain < chains; chain++) {
        const float h = time[chain], half = 0.5f * h, c = keep[chain], s = rough[chain];
        const float *position = positions + chain * position_stride, *__restrict anchor = anchors + chain * anchor_stride;
        const float *__restrict gradient = gradients + chain * gradient_stride, *__restrict noise = noises + chain * noise_stride;
        const float* momentum = momenta + chain * momentum_stride;
        float *to_position = new_positions + chain * new_position_stride, *to_momentum = new_momenta + chain * new_momentum_stride;
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) {
            float drift = nbeta * gradient[i] + gamma * (position[i] - anchor[i]);
            if (decay != 0) drift = drift + decay * position[i];
            const float kicked = momentum[i] - h * drift;
            const float halfway = position[i] + half * kicked;
            const float thermal = c * kicked + s * noise[i];
            to_momentum[i] = thermal;
            to_position[i] = halfway + half * thermal;
        }
    }
}
