// Posterior means of a task among M known ones, after each prefix of a sequence, streamed over the tasks.
//
// One SIMD lane is one sequence. Tasks come in blocks: the log-likelihoods of a block are kept, its maximum joins the
// running one, and sums of exp(log-likelihood - maximum) are carried on (an online softmax: Milakov & Gimelshein,
// arXiv 1805.02867). Sums within a block are float, sums over blocks double, so that the error does not grow with M;
// memory does not grow with M or with the batch. Compiles with GCC and Clang, C++17.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int D = TASK_SIZE, K = NUM_EXAMPLES, BLOCK = 64;

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(float))));
typedef double wide __attribute__((vector_size(LANES * sizeof(double))));

inline vec maximum(vec a, vec b) { return a > b ? a : b; }
inline wide widen(vec a) { return __builtin_convertvector(a, wide); }

// exp for arguments <= 0: 2^n times the Taylor polynomial of the rest |r| <= ln(2)/2. Adding 1.5 * 2^23 rounds to an
// integer held in the low bits.
inline vec exponential(vec a) {
    constexpr float MAGIC = 12582912.0f;
    a = maximum(a, vec{} - 87.0f);
    const vec shifted = a * 1.44269504f + MAGIC, n = shifted - MAGIC;
    const vec r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = vec{} + 1.0f / 5040;
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + coefficient;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

// What is known of one tile of sequences after the tasks seen so far, for the prefixes of 1..K-1 examples.
struct Posterior {
    vec x[K][D], y[K];
    vec log_likelihood[K][BLOCK], largest[K];
    wide evidence[K], moment[K][D];
};

void load(Posterior& p, const float* xs, const float* ys, int64_t first, int64_t batch) {
    for (int k = 0; k < K; k++) {
        p.largest[k] = vec{} - 1e30f, p.evidence[k] = wide{};
        for (int d = 0; d < D; d++) p.moment[k][d] = wide{};
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t row = std::min(first + lane, batch - 1) * K + k;
            p.y[k][lane] = ys[row];
            for (int d = 0; d < D; d++) p.x[k][d][lane] = xs[row * D + d];
        }
    }
}

void see(Posterior& p, const float* tasks, int count) {
    vec block_largest[K];
    for (int k = 1; k < K; k++) block_largest[k] = p.largest[k];
    for (int m = 0; m < count; m++) {
        vec log_likelihood = {};
        for (int k = 1; k < K; k++) {
            vec residual = p.y[k - 1];
#pragma GCC unroll 16
            for (int d = 0; d < D; d++) residual -= tasks[m * D + d] * p.x[k - 1][d];
            log_likelihood -= residual * residual;
            p.log_likelihood[k][m] = log_likelihood;
            block_largest[k] = maximum(block_largest[k], log_likelihood);
        }
    }
    for (int k = 1; k < K; k++) {
        vec evidence = {}, moment[D] = {};
        for (int m = 0; m < count; m++) {
            const vec likelihood = exponential(p.log_likelihood[k][m] - block_largest[k]);
            evidence += likelihood;
#pragma GCC unroll 16
            for (int d = 0; d < D; d++) moment[d] += likelihood * tasks[m * D + d];
        }
        const wide decay = widen(exponential(p.largest[k] - block_largest[k]));
        p.evidence[k] = p.evidence[k] * decay + widen(evidence);
        for (int d = 0; d < D; d++) p.moment[k][d] = p.moment[k][d] * decay + widen(moment[d]);
        p.largest[k] = block_largest[k];
    }
}

}  // namespace

extern "C" {

// means (B,K,D) for xs (B,K,D), ys (B,K) and tasks (M,D), where an example has the log-likelihood -(y - w.x)^2: the
// mean task given the examples before each, the plain mean for the first.
void dmmse_weights(const float* xs, const float* ys, const float* tasks, int64_t batch, int64_t num_tasks, int threads,
                   float* means) {
    double prior[D] = {};
    for (int64_t m = 0; m < num_tasks; m++)
        for (int d = 0; d < D; d++) prior[d] += tasks[m * D + d];

    std::atomic<int64_t> next{0};
    const auto work = [&] {
        std::vector<char> memory(sizeof(Posterior) + 128);
        Posterior& p = *reinterpret_cast<Posterior*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128);
        for (int64_t first; (first = LANES * next++) < batch;) {
            load(p, xs, ys, first, batch);
            for (int64_t m = 0; m < num_tasks; m += BLOCK)
                see(p, tasks + m * D, int(std::min<int64_t>(BLOCK, num_tasks - m)));
            for (int64_t row = first; row < std::min(first + LANES, batch); row++)
                for (int k = 0; k < K; k++)
                    for (int d = 0; d < D; d++)
                        means[(row * K + k) * D + d] =
                            k == 0 ? float(prior[d] / double(num_tasks))
                                   : float(p.moment[k][d][row - first] / p.evidence[k][row - first]);
        }
    };
    std::vector<std::thread> others;
    try {
        for (int thread = 1; thread < threads; thread++) others.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run, and this one, do all the tiles.
    }
    work();
    for (auto& other : others) other.join();
}
}
