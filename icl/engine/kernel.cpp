// Loss and gradient of the in-context regression transformer, forward and backward in one pass over cache-sized tiles; and
// its predictions alone.
//
// One SIMD lane is one sequence. A tile holds LANES sequences, and every activation is an array of vectors indexed
// [channel][token], so that the code below reads like the program for a single sequence: softmax, layer norm and causal
// attention are plain loops without masks, padding or sums across lanes. A linear map is a matrix product whose columns
// are the tokens (`multiply`); the gradient of its weight needs the activation once in the transposed order
// (`transpose`, `accumulate_outer`).
//
// What is not needed is not computed:
//
// 1. Tokens stand in the order x_1..x_K, y_1..y_{K-1} (the last y token influences no prediction), so that in the last
//    block, where only x tokens matter, queries, output map, MLP, final norm and unembedding run over the first K
//    columns alone.
// 2. The gain and bias of a layer norm and the factor 1/sqrt(head size) are folded into the next map before, and
//    unfolded from its gradient after.
// 3. The stream that enters block 0 is A u, with u = (token, one-hot position), so the queries, keys and values of
//    block 0 are rstd * (W A) u + W bias: a product with D+1 numbers per token instead of C.
//
// The batch is cut into SLICES, whatever the number of threads; slices are summed in order. The result's bits therefore
// depend neither on the number of threads nor on the load of the machine (they do depend on the vector width of the
// CPU).
//
// Sizes come from -D macros; the parameters are the flat vector of icl.model.parameter_layout. Compiles with GCC and
// Clang, C++17.
//
// Shape letters: K examples, D task dimension, T tokens in use (2K-1), C channels, F mlp width, H heads, L layers,
// R = D+1+T inputs of the embedding.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8, OUTER_COLUMNS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 4, OUTER_COLUMNS = 2;
#else
constexpr int LANES = 4, TILE_ROWS = 4, OUTER_COLUMNS = 2;
#endif
// Register tiles: their accumulators and operands fit the register file.
constexpr int TILE_COLUMNS = 3, OUTER_ROWS = 6, KEYS_AT_ONCE = 8;
constexpr int SLICES = 8;

constexpr int D = TASK_SIZE, KMAX = MAX_EXAMPLES, C = EMBED_SIZE, F = MLP_SIZE, H = NUM_HEADS, L = NUM_LAYERS;
constexpr bool NORM = LAYER_NORM, OUTPUT_MAP = INCLUDE_OUTPUT, DOUBLED = RESIDUAL_DOUBLED;
constexpr int T = 2 * KMAX - 1, HEAD = C / H, R = D + 1 + T;
constexpr float EPSILON = 1e-5f;

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(float))));
#define INLINE inline __attribute__((always_inline))

constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }
constexpr int CP = padded(C), FP = padded(F);

// ==== Where each parameter lies in the flat vector ========================================================

constexpr int64_t NORM_SIZE = NORM ? 2 * C : 0;
constexpr int64_t TOKEN_EMBEDDING = 0, POSITION_EMBEDDING = int64_t(C) * (D + 1),
                  BLOCKS = POSITION_EMBEDDING + int64_t(C) * 2 * KMAX;
constexpr int64_t ATTENTION_NORM = 0, QKV = NORM_SIZE, OUTPUT = QKV + int64_t(3) * C * C,
                  MLP_NORM = OUTPUT + (OUTPUT_MAP ? int64_t(C) * C : 0), UP = MLP_NORM + NORM_SIZE,
                  UP_BIAS = UP + int64_t(F) * C, DOWN = UP_BIAS + F, DOWN_BIAS = DOWN + int64_t(C) * F,
                  BLOCK_SIZE = DOWN_BIAS + C;
constexpr int64_t FINAL_NORM = BLOCKS + L * BLOCK_SIZE, UNEMBEDDING = FINAL_NORM + NORM_SIZE,
                  UNEMBEDDING_BIAS = UNEMBEDDING + int64_t(D + 1) * C, PARAMETERS = UNEMBEDDING_BIAS + D + 1;

// Row of `qkv.weight` (grouped per head as q, k, v) that becomes row r of the folded map (all queries, then all keys,
// then all values).
INLINE int qkv_row(int r) { return (r % C) / HEAD * 3 * HEAD + r / C * HEAD + r % HEAD; }
INLINE float qkv_scale(int r) { return r < C ? 1.0f / std::sqrt(float(HEAD)) : 1.0f; }

// The maps with gains folded in, shared by all threads.
struct Weights {
    float embedding[C][R];  // A: token embedding, then position embedding in token order
    float centred[C][R];    // A minus its mean over channels (A itself without layer norm)
    float centred_transposed[R][C];
    float grad_centred[C][R];  // scratch of `unfold`
    float first[3 * C][R];     // block 0: folded qkv times `centred`
    float qkv[L][3 * C][C], qkv_bias[L][3 * C];
    float up[L][F][C], up_bias[L][F];
    float head[C], head_bias;  // row 0 of the unembedding
};

// Gradients with respect to the folded maps, one per slice. Rows are padded to whole vectors.
struct Gradients {
    float embedding[C][R], first[3 * C][R];
    float qkv[L][3 * C][CP], output[L][C][CP], up[L][F][CP], down[L][C][FP];
    float qkv_bias[L][3 * C], up_bias[L][F], down_bias[L][C];
    float head[C], head_bias;
};

// Per-lane sums, reduced to `Gradients` once per slice.
struct LaneSums {
    vec embedding[C][R], first[3 * C][R];
    vec qkv_bias[L][3 * C], up_bias[L][F], down_bias[L][C];
    vec head[C], head_bias, losses[KMAX];
};

// What the backward pass of one block needs.
struct Saved {
    vec attention_normed[C][T], attention_rstd[T];
    vec qkv[3 * C][T], pattern[H][T][T], heads[C][T];
    vec mlp_normed[C][T], mlp_rstd[T], hidden[F][T];
};

// One thread's scratch.
struct Scratch {
    LaneSums sums;
    Saved saved[L];
    vec x[D][KMAX], y[KMAX], valid;
    vec stream[C][T], middle[C][T], final_normed[C][T], final_rstd[T];
    vec grad_stream[C][T], grad_middle[C][T], grad_normed[C][T], grad_hidden[F][T], grad_heads[C][T],
        grad_qkv[3 * C][T];
    vec pattern_transposed[T][T], grad_scores[T][T], grad_scores_transposed[T][T];
    alignas(64) float transposed[T * LANES * (CP > FP ? CP : FP)];
};

// ==== Vector arithmetic ===================================================================================

INLINE vec splat(float value) { return vec{} + value; }
INLINE vec maximum(vec a, vec b) { return a > b ? a : b; }

INLINE float sum_lanes(vec a) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += a[lane];
    return total;
}

INLINE vec reciprocal_root(vec a) {
    for (int lane = 0; lane < LANES; lane++) a[lane] = 1.0f / std::sqrt(a[lane]);
    return a;
}

// exp for arguments <= 0: 2^n times the Taylor polynomial of the rest |r| <= ln(2)/2. Adding 1.5 * 2^23 rounds to an
// integer held in the low bits.
INLINE vec exponential(vec a) {
    constexpr float MAGIC = 12582912.0f;
    a = maximum(a, splat(-87.0f));
    const vec shifted = a * 1.44269504f + MAGIC, n = shifted - MAGIC;
    const vec r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = splat(1.0f / 5040);
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + coefficient;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

// ==== Matrix products =====================================================================================

// store(row, column,
// sum over k < DEPTH of a[row * ROW + k * STEP] * x[k][column]) for a register tile of ROWS x COLUMNS.
template <int ROWS, int COLUMNS, int DEPTH, int ROW, int STEP, class Store>
INLINE void multiply_tile(const float* __restrict a, const vec (*__restrict x)[T], int row, int column, Store&& store) {
    vec sum[ROWS][COLUMNS] = {};
    a += row * ROW;
    for (int k = 0; k < DEPTH; k++) {
        vec operand[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) operand[j] = x[k][column + j];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const float weight = a[i * ROW + k * STEP];
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += weight * operand[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) store(row + i, column + j, sum[i][j]);
}

template <int COLUMNS, int ROWS, int DEPTH, int ROW, int STEP, class Store>
INLINE void multiply_columns(const float* a, const vec (*x)[T], int column, Store&& store) {
    int row = 0;
    for (; row + TILE_ROWS <= ROWS; row += TILE_ROWS)
        multiply_tile<TILE_ROWS, COLUMNS, DEPTH, ROW, STEP>(a, x, row, column, store);
    if constexpr (ROWS % TILE_ROWS)
        multiply_tile<ROWS % TILE_ROWS, COLUMNS, DEPTH, ROW, STEP>(a, x, row, column, store);
}

// The whole product: ROWS outputs, `columns` tokens. A is (ROWS, DEPTH) with ROW = DEPTH, STEP = 1, or the transpose of
// (DEPTH, ROWS) with ROW = 1, STEP = ROWS.
template <int ROWS, int DEPTH, int ROW, int STEP, class Store>
__attribute__((noinline)) void multiply(const float* a, const vec (*x)[T], int columns, Store store) {
    int column = 0;
    for (; column + TILE_COLUMNS <= columns; column += TILE_COLUMNS)
        multiply_columns<TILE_COLUMNS, ROWS, DEPTH, ROW, STEP>(a, x, column, store);
    for (; column + 2 <= columns; column += 2) multiply_columns<2, ROWS, DEPTH, ROW, STEP>(a, x, column, store);
    for (; column < columns; column++) multiply_columns<1, ROWS, DEPTH, ROW, STEP>(a, x, column, store);
}

// One butterfly stage of the LANES x LANES transpose: swap the off-diagonal blocks of distance STEP between the rows a
// and b.
template <int STEP, size_t... LANE>
INLINE void exchange(vec& a, vec& b, std::index_sequence<LANE...>) {
    const vec low = __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
    a = low;
}

template <int STEP>
INLINE void transpose_stages(vec (&rows)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES>());
    if constexpr (STEP > 1) transpose_stages<STEP / 2>(rows);
}

// to[token * LANES + lane][row] = x[row][token][lane], rows padded with zeros.
template <int ROWS>
__attribute__((noinline)) void transpose(float* __restrict to, const vec (*__restrict x)[T], int columns) {
    constexpr int WIDTH = padded(ROWS);
    for (int column = 0; column < columns; column++)
        for (int first = 0; first < WIDTH; first += LANES) {
            vec rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) rows[i] = first + i < ROWS ? x[first + i][column] : vec{};
            transpose_stages<LANES / 2>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                std::memcpy(to + (column * LANES + i) * WIDTH + first, &rows[i], sizeof(vec));
        }
}

template <int ROWS, int COLUMNS, int WIDTH>
INLINE void outer_tile(float* __restrict grad, const vec (*__restrict dy)[T], const float* __restrict x, int count,
                       int row, int column) {
    vec sum[ROWS][COLUMNS] = {};
    const float* scalars[ROWS];
    for (int i = 0; i < ROWS; i++) scalars[i] = reinterpret_cast<const float*>(dy[row + i]);
    x += column;
    for (int n = 0; n < count; n++, x += WIDTH) {
        vec operand[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) std::memcpy(&operand[j], x + j * LANES, sizeof(vec));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const float value = scalars[i][n];
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += value * operand[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            float* target = grad + (row + i) * WIDTH + column + j * LANES;
            vec value;
            std::memcpy(&value, target, sizeof(vec));
            value += sum[i][j];
            std::memcpy(target, &value, sizeof(vec));
        }
}

template <int COLUMNS, int ROWS, int WIDTH>
INLINE void outer_columns(float* grad, const vec (*dy)[T], const float* x, int count, int column) {
    int row = 0;
    for (; row + OUTER_ROWS <= ROWS; row += OUTER_ROWS)
        outer_tile<OUTER_ROWS, COLUMNS, WIDTH>(grad, dy, x, count, row, column);
    if constexpr (ROWS % OUTER_ROWS) outer_tile<ROWS % OUTER_ROWS, COLUMNS, WIDTH>(grad, dy, x, count, row, column);
}

// grad[i][j] += sum over tokens and lanes of dy[i] * x[j], with x transposed.
template <int ROWS, int WIDTH>
__attribute__((noinline)) void accumulate_outer(float* grad, const vec (*dy)[T], const float* x, int columns) {
    constexpr int BLOCK = OUTER_COLUMNS * LANES;
    int column = 0;
    for (; column + BLOCK <= WIDTH; column += BLOCK)
        outer_columns<OUTER_COLUMNS, ROWS, WIDTH>(grad, dy, x, columns * LANES, column);
    for (; column < WIDTH; column += LANES) outer_columns<1, ROWS, WIDTH>(grad, dy, x, columns * LANES, column);
}

INLINE void accumulate_rows(vec* sums, const vec (*x)[T], int rows, int columns) {
    for (int i = 0; i < rows; i++) {
        vec total = x[i][0];
        for (int t = 1; t < columns; t++) total += x[i][t];
        sums[i] += total;
    }
}

// ==== Layer norm without gain and bias ====================================================================

__attribute__((noinline)) void normalise(vec (*__restrict out)[T], vec* __restrict rstd, const vec (*__restrict x)[T],
                                         int columns) {
    if constexpr (!NORM) {
        for (int c = 0; c < C; c++) std::memcpy(out[c], x[c], columns * sizeof(vec));
        return;
    }
    vec mean[T] = {}, variance[T] = {};
    for (int c = 0; c < C; c++)
        for (int t = 0; t < columns; t++) mean[t] += x[c][t];
    for (int t = 0; t < columns; t++) mean[t] *= 1.0f / C;
    for (int c = 0; c < C; c++)
        for (int t = 0; t < columns; t++) {
            const vec centred = x[c][t] - mean[t];
            out[c][t] = centred;
            variance[t] += centred * centred;
        }
    for (int t = 0; t < columns; t++) rstd[t] = reciprocal_root(variance[t] * (1.0f / C) + EPSILON);
    for (int c = 0; c < C; c++)
        for (int t = 0; t < columns; t++) out[c][t] *= rstd[t];
}

// store(c, t, gradient of the norm's input) from the gradient of its output.
template <class Store>
INLINE void normalise_backward(const vec (*grad)[T], const vec (*normed)[T], const vec* rstd, int columns,
                               Store store) {
    vec mean[T] = {}, projection[T] = {};
    if constexpr (NORM) {
        for (int c = 0; c < C; c++)
            for (int t = 0; t < columns; t++) mean[t] += grad[c][t], projection[t] += grad[c][t] * normed[c][t];
        for (int t = 0; t < columns; t++) mean[t] *= 1.0f / C, projection[t] *= 1.0f / C;
    }
    for (int c = 0; c < C; c++)
        for (int t = 0; t < columns; t++)
            store(c, t, NORM ? rstd[t] * (grad[c][t] - mean[t] - normed[c][t] * projection[t]) : grad[c][t]);
}

// ==== Attention ===========================================================================================

// x tokens are
// columns 0..K-1, y tokens K..2K-2. The tokens that a query sees, or the queries that see a key, are one range of each
// kind.
struct Ranges {
    int x_begin, x_end, y_begin, y_end;
    template <class Body>
    INLINE void each(Body body) const {
        for (int s = x_begin; s < x_end; s++) body(s);
        for (int s = y_begin; s < y_end; s++) body(s);
    }
};
INLINE Ranges keys_of(int query, int K) {
    return query < K ? Ranges{0, query + 1, K, K + query} : Ranges{0, query - K + 1, K, query + 1};
}
INLINE Ranges queries_of(int key, int K, int queries) {
    const int first_y = key < K ? K + key : key;
    return {key < K ? key : key - K + 1, K, std::min(first_y, queries), queries};
}

template <int COUNT>
INLINE void dots_block(vec* out, const vec* q, const vec (*k)[T], int key) {
    vec sum[COUNT] = {};
#pragma GCC unroll 4
    for (int i = 0; i < HEAD; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; j++) sum[j] += q[i] * k[i][key + j];
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; j++) out[key + j] = sum[j];
}

// out[s] = sum over i of q[i][query] k[i][s] for the keys s in range.
INLINE void dots(vec* out, const vec (*q)[T], int query, const vec (*k)[T], Ranges range) {
    vec column[HEAD];
    for (int i = 0; i < HEAD; i++) column[i] = q[i][query];
    const int bounds[2][2] = {{range.x_begin, range.x_end}, {range.y_begin, range.y_end}};
    for (auto& bound : bounds) {
        int s = bound[0];
        for (; s + 8 <= bound[1]; s += 8) dots_block<8>(out, column, k, s);
        for (; s + 4 <= bound[1]; s += 4) dots_block<4>(out, column, k, s);
        for (; s < bound[1]; s++) dots_block<1>(out, column, k, s);
    }
}

template <int COUNT>
INLINE void mix_block(vec (*out)[T], int column, const vec* weight, const vec (*v)[T], Ranges range) {
    vec sum[COUNT] = {};
    range.each([&](int s) {
        const vec w = weight[s];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) sum[i] += w * v[i][s];
    });
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) out[i][column] = sum[i];
}

// out[i][column] = sum over s in range of weight[s] v[i][s].
INLINE void mix(vec (*out)[T], int column, const vec* weight, const vec (*v)[T], Ranges range) {
    int i = 0;
    for (; i + KEYS_AT_ONCE <= HEAD; i += KEYS_AT_ONCE) mix_block<KEYS_AT_ONCE>(out + i, column, weight, v + i, range);
    if constexpr (HEAD % KEYS_AT_ONCE) mix_block<HEAD % KEYS_AT_ONCE>(out + i, column, weight, v + i, range);
}

__attribute__((noinline)) void attend(Saved& saved, int K, int queries) {
    for (int h = 0; h < H; h++) {
        const vec(*q)[T] = saved.qkv + h * HEAD, (*k)[T] = q + C, (*v)[T] = k + C;
        for (int t = 0; t < queries; t++) {
            const Ranges keys = keys_of(t, K);
            vec* row = saved.pattern[h][t];
            dots(row, q, t, k, keys);
            vec largest = row[0], total = {};
            keys.each([&](int s) { largest = maximum(largest, row[s]); });
            keys.each([&](int s) { total += row[s] = exponential(row[s] - largest); });
            const vec scale = 1.0f / total;
            keys.each([&](int s) { row[s] *= scale; });
            mix(saved.heads + h * HEAD, t, row, v, keys);
        }
    }
}

__attribute__((noinline)) void attend_backward(Scratch& w, const Saved& saved, const vec (*grad_heads)[T], int K,
                                               int queries) {
    const int tokens = 2 * K - 1;
    for (int h = 0; h < H; h++) {
        const vec(*q)[T] = saved.qkv + h * HEAD, (*k)[T] = q + C, (*v)[T] = k + C, (*grad)[T] = grad_heads + h * HEAD;
        vec(*grad_q)[T] = w.grad_qkv + h * HEAD, (*grad_k)[T] = grad_q + C, (*grad_v)[T] = grad_k + C;
        for (int t = 0; t < queries; t++) {
            const Ranges keys = keys_of(t, K);
            const vec* pattern = saved.pattern[h][t];
            vec *row = w.grad_scores[t], total = {};
            dots(row, grad, t, v, keys);
            keys.each([&](int s) { total += pattern[s] * row[s]; });
            keys.each([&](int s) {
                row[s] = pattern[s] * (row[s] - total);
                w.pattern_transposed[s][t] = pattern[s], w.grad_scores_transposed[s][t] = row[s];
            });
            mix(grad_q, t, row, k, keys);
        }
        for (int s = 0; s < tokens; s++) {
            const Ranges seen_by = queries_of(s, K, queries);
            mix(grad_v, s, w.pattern_transposed[s], grad, seen_by);
            mix(grad_k, s, w.grad_scores_transposed[s], q, seen_by);
        }
    }
}

// ==== The first map: products with u = (token, one-hot position) ==========================================

// Value of row `a` of an embedding-like map on token t: x tokens
// hold (0, x), y tokens (y, 0).
INLINE vec embed(const float* a, const Scratch& w, int t, int K) {
    vec value = splat(a[D + 1 + t]);
    if (t >= K) return value + a[0] * w.y[t - K];
#pragma GCC unroll 16
    for (int d = 0; d < D; d++) value += a[1 + d] * w.x[d][t];
    return value;
}

// Gradient of that row, from the gradient g(t) of its values on the first `columns` tokens.
template <class Gradient>
INLINE void embed_backward(vec* sums, const Scratch& w, int columns, int K, Gradient g) {
    vec token[D + 1] = {};
    for (int t = 0; t < std::min(columns, K); t++) {
        const vec value = g(t);
        sums[D + 1 + t] += value;
#pragma GCC unroll 16
        for (int d = 0; d < D; d++) token[1 + d] += value * w.x[d][t];
    }
    for (int t = K; t < columns; t++) {
        const vec value = g(t);
        sums[D + 1 + t] += value;
        token[0] += value * w.y[t - K];
    }
    for (int d = 0; d <= D; d++) sums[d] += token[d];
}

// ==== One tile: LANES sequences from `first`, those at or beyond `batch` weigh nothing ====================

void load(Scratch& w, const float* xs, const float* ys, int64_t first, int64_t batch, int K) {
    w.valid = vec{};
    for (int lane = 0; lane < LANES; lane++) {
        const bool valid = first + lane < batch;
        const float *x = xs + (first + lane) * K * D, *y = ys + (first + lane) * K;
        w.valid[lane] = valid;
        for (int k = 0; k < K; k++) {
            w.y[k][lane] = valid ? y[k] : 0.0f;
            for (int d = 0; d < D; d++) w.x[d][k][lane] = valid ? x[k * D + d] : 0.0f;
        }
    }
}

void forward(Scratch& w, const Weights& folded, const float* params, int K) {
    const int tokens = 2 * K - 1;
    for (int c = 0; c < C; c++)
        for (int t = 0; t < tokens; t++) w.stream[c][t] = embed(folded.embedding[c], w, t, K);
    for (int l = 0; l < L; l++) {
        const float* block = params + BLOCKS + l * BLOCK_SIZE;
        const int queries = l == L - 1 ? K : tokens;
        Saved& saved = w.saved[l];
        if (l == 0) {
            for (int t = 0; t < tokens; t++) {
                vec variance = {};
                if (NORM)
                    for (int c = 0; c < C; c++) {
                        const vec centred = embed(folded.centred[c], w, t, K);
                        variance += centred * centred;
                    }
                saved.attention_rstd[t] = NORM ? reciprocal_root(variance * (1.0f / C) + EPSILON) : splat(1.0f);
            }
            for (int r = 0; r < 3 * C; r++)
                for (int t = 0; t < (r < C ? queries : tokens); t++)
                    saved.qkv[r][t] = embed(folded.first[r], w, t, K) * saved.attention_rstd[t] + folded.qkv_bias[0][r];
        } else {
            normalise(saved.attention_normed, saved.attention_rstd, w.stream, tokens);
            const auto store_from = [&](int first) {
                return [&saved, &folded, l, first](int r, int t, vec sum) {
                    saved.qkv[first + r][t] = sum + folded.qkv_bias[l][first + r];
                };
            };
            multiply<C, C, C, 1>(folded.qkv[l][0], saved.attention_normed, queries, store_from(0));
            multiply<2 * C, C, C, 1>(folded.qkv[l][C], saved.attention_normed, tokens, store_from(C));
        }
        attend(saved, K, queries);
        if constexpr (OUTPUT_MAP)
            multiply<C, C, C, 1>(block + OUTPUT, saved.heads, queries,
                                 [&](int c, int t, vec sum) { w.middle[c][t] = w.stream[c][t] + sum; });
        else
            for (int c = 0; c < C; c++)
                for (int t = 0; t < queries; t++) w.middle[c][t] = w.stream[c][t] + saved.heads[c][t];
        normalise(saved.mlp_normed, saved.mlp_rstd, w.middle, queries);
        multiply<F, C, C, 1>(folded.up[l][0], saved.mlp_normed, queries, [&](int f, int t, vec sum) {
            saved.hidden[f][t] = maximum(sum + folded.up_bias[l][f], vec{});
        });
        multiply<C, F, F, 1>(block + DOWN, saved.hidden, queries, [&](int c, int t, vec sum) {
            const vec out = w.middle[c][t] + sum + block[DOWN_BIAS + c];
            w.stream[c][t] = DOUBLED ? w.stream[c][t] + out : out;
        });
    }
    normalise(w.final_normed, w.final_rstd, w.stream, K);
}

INLINE vec prediction(const Scratch& w, const Weights& folded, int k) {
    vec sum = splat(folded.head_bias);
    for (int c = 0; c < C; c++) sum += folded.head[c] * w.final_normed[c][k];
    return sum;
}

// Squared errors, and the gradient of their mean with respect to the stream after the last block.
void score(Scratch& w, const Weights& folded, float scale, int K) {
    for (int k = 0; k < K; k++) {
        const vec error = (prediction(w, folded, k) - w.y[k]) * w.valid, grad = 2.0f * scale * error;
        w.sums.losses[k] += error * error;
        w.sums.head_bias += grad;
        for (int c = 0; c < C; c++) {
            w.sums.head[c] += grad * w.final_normed[c][k];
            w.grad_normed[c][k] = grad * folded.head[c];
        }
    }
    normalise_backward(w.grad_normed, w.final_normed, w.final_rstd, K,
                       [&](int c, int t, vec value) { w.grad_stream[c][t] = value; });
}

void backward(Scratch& w, Gradients& grads, const Weights& folded, const float* params, int K) {
    const int tokens = 2 * K - 1;
    for (int l = L - 1; l >= 0; l--) {
        const float* block = params + BLOCKS + l * BLOCK_SIZE;
        const int queries = l == L - 1 ? K : tokens;
        Saved& saved = w.saved[l];

        transpose<F>(w.transposed, saved.hidden, queries);
        accumulate_outer<C, FP>(grads.down[l][0], w.grad_stream, w.transposed, queries);
        accumulate_rows(w.sums.down_bias[l], w.grad_stream, C, queries);
        multiply<F, C, 1, F>(block + DOWN, w.grad_stream, queries, [&](int f, int t, vec sum) {
            w.grad_hidden[f][t] = saved.hidden[f][t] > 0.0f ? sum : vec{};
        });
        transpose<C>(w.transposed, saved.mlp_normed, queries);
        accumulate_outer<F, CP>(grads.up[l][0], w.grad_hidden, w.transposed, queries);
        accumulate_rows(w.sums.up_bias[l], w.grad_hidden, F, queries);
        multiply<C, F, 1, C>(folded.up[l][0], w.grad_hidden, queries,
                             [&](int c, int t, vec sum) { w.grad_normed[c][t] = sum; });
        normalise_backward(w.grad_normed, saved.mlp_normed, saved.mlp_rstd, queries, [&](int c, int t, vec value) {
            w.grad_middle[c][t] = w.grad_stream[c][t] + value;
            w.grad_stream[c][t] = DOUBLED ? w.grad_stream[c][t] + w.grad_middle[c][t] : w.grad_middle[c][t];
        });
        for (int c = 0; c < C; c++)
            for (int t = queries; t < tokens; t++) w.grad_stream[c][t] = vec{};

        if constexpr (OUTPUT_MAP) {
            transpose<C>(w.transposed, saved.heads, queries);
            accumulate_outer<C, CP>(grads.output[l][0], w.grad_middle, w.transposed, queries);
            multiply<C, C, 1, C>(block + OUTPUT, w.grad_middle, queries,
                                 [&](int c, int t, vec sum) { w.grad_heads[c][t] = sum; });
        }
        attend_backward(w, saved, OUTPUT_MAP ? w.grad_heads : w.grad_middle, K, queries);
        accumulate_rows(w.sums.qkv_bias[l], w.grad_qkv, C, queries);
        accumulate_rows(w.sums.qkv_bias[l] + C, w.grad_qkv + C, 2 * C, tokens);
        if (l > 0) {
            transpose<C>(w.transposed, saved.attention_normed, tokens);
            accumulate_outer<C, CP>(grads.qkv[l][0], w.grad_qkv, w.transposed, queries);
            accumulate_outer<2 * C, CP>(grads.qkv[l][C], w.grad_qkv + C, w.transposed, tokens);
            multiply<C, 2 * C, 1, C>(folded.qkv[l][C], w.grad_qkv + C, tokens,
                                     [&](int c, int t, vec sum) { w.grad_normed[c][t] = sum; });
            multiply<C, C, 1, C>(folded.qkv[l][0], w.grad_qkv, queries,
                                 [&](int c, int t, vec sum) { w.grad_normed[c][t] += sum; });
            normalise_backward(w.grad_normed, saved.attention_normed, saved.attention_rstd, tokens,
                               [&](int c, int t, vec value) { w.grad_stream[c][t] += value; });
        } else {
            vec projection[T] = {};  // sum over rows of (gradient times value) = rstd times the gradient of rstd
            for (int r = 0; r < 3 * C; r++) {
                const int columns = r < C ? queries : tokens;
                for (int t = 0; NORM && t < columns; t++)
                    projection[t] += w.grad_qkv[r][t] * (saved.qkv[r][t] - folded.qkv_bias[0][r]);
                embed_backward(w.sums.first[r], w, columns, K,
                               [&](int t) { return w.grad_qkv[r][t] * saved.attention_rstd[t]; });
            }
            for (int t = 0; t < tokens; t++)
                projection[t] *= saved.attention_rstd[t] * saved.attention_rstd[t] * (-1.0f / C);
            for (int c = 0; c < C; c++)
                embed_backward(w.sums.embedding[c], w, tokens, K, [&](int t) {
                    return NORM ? w.grad_stream[c][t] + projection[t] * embed(folded.centred[c], w, t, K)
                                : w.grad_stream[c][t];
                });
        }
    }
}

// ==== Folding and unfolding of norms, once per call =======================================================

INLINE float gain(const float* norm, int c) { return NORM ? norm[c] : 1.0f; }
INLINE float shift(const float* norm, int c) { return NORM ? norm[C + c] : 0.0f; }

int position(int t, int K) { return t < K ? 2 * t : 2 * (t - K) + 1; }

void fold(Weights& folded, const float* params, int K) {
    const int inputs = D + 1 + 2 * K - 1;
    float mean[R] = {};
    for (int c = 0; c < C; c++) {
        for (int r = 0; r < inputs; r++)
            folded.embedding[c][r] = r <= D ? params[TOKEN_EMBEDDING + c * (D + 1) + r]
                                            : params[POSITION_EMBEDDING + c * 2 * KMAX + position(r - D - 1, K)];
        for (int r = 0; NORM && r < inputs; r++) mean[r] += folded.embedding[c][r] * (1.0f / C);
    }
    for (int c = 0; c < C; c++)
        for (int r = 0; r < inputs; r++)
            folded.centred_transposed[r][c] = folded.centred[c][r] = folded.embedding[c][r] - mean[r];
    for (int l = 0; l < L; l++) {
        const float *block = params + BLOCKS + l * BLOCK_SIZE, *norm = block + ATTENTION_NORM;
        for (int r = 0; r < 3 * C; r++) {
            const float *row = block + QKV + int64_t(qkv_row(r)) * C, scale = qkv_scale(r);
            float bias = 0;
            for (int c = 0; c < C; c++)
                folded.qkv[l][r][c] = scale * row[c] * gain(norm, c), bias += scale * row[c] * shift(norm, c);
            folded.qkv_bias[l][r] = bias;
        }
        norm = block + MLP_NORM;
        for (int f = 0; f < F; f++) {
            const float* row = block + UP + int64_t(f) * C;
            float bias = block[UP_BIAS + f];
            for (int c = 0; c < C; c++) folded.up[l][f][c] = row[c] * gain(norm, c), bias += row[c] * shift(norm, c);
            folded.up_bias[l][f] = bias;
        }
    }
    std::memset(folded.first, 0, sizeof folded.first);
    for (int r = 0; r < 3 * C; r++)
        for (int c = 0; c < C; c++)
            for (int i = 0; i < inputs; i++) folded.first[r][i] += folded.qkv[0][r][c] * folded.centred[c][i];
    const float *norm = params + FINAL_NORM, *head = params + UNEMBEDDING;
    folded.head_bias = params[UNEMBEDDING_BIAS];
    for (int c = 0; c < C; c++) folded.head[c] = head[c] * gain(norm, c), folded.head_bias += head[c] * shift(norm, c);
}

// Gradient of one row w of a map behind a norm, from the gradient of the folded row w * gain and of the folded bias w .
// shift.
INLINE void unfold_row(float* grad, float* grad_norm, const float* row, const float* norm, const float* folded,
                       float folded_bias, float scale) {
    folded_bias *= scale;
    for (int c = 0; c < C; c++) {
        grad[c] += scale * folded[c] * gain(norm, c) + folded_bias * shift(norm, c);
        if (NORM) grad_norm[c] += scale * folded[c] * row[c], grad_norm[C + c] += folded_bias * row[c];
    }
}

void unfold(float* grad, Gradients& sum, Weights& folded, const float* params, int K) {
    const int inputs = D + 1 + 2 * K - 1;
    std::fill(grad, grad + PARAMETERS, 0.0f);

    // Block 0: from the map on u to the folded qkv map and to the embedding.
    float mean[R] = {};
    std::memset(folded.grad_centred, 0, sizeof folded.grad_centred);
    for (int r = 0; r < 3 * C; r++) {
        for (int i = 0; i < inputs; i++)
            for (int c = 0; c < C; c++) sum.qkv[0][r][c] += sum.first[r][i] * folded.centred_transposed[i][c];
        for (int c = 0; c < C; c++)
            for (int i = 0; i < inputs; i++) folded.grad_centred[c][i] += folded.qkv[0][r][c] * sum.first[r][i];
    }
    for (int c = 0; c < C && NORM; c++)
        for (int i = 0; i < inputs; i++) mean[i] += folded.grad_centred[c][i] * (1.0f / C);
    for (int c = 0; c < C; c++)
        for (int i = 0; i < inputs; i++) {
            const float value = sum.embedding[c][i] + folded.grad_centred[c][i] - mean[i];
            grad[i <= D ? TOKEN_EMBEDDING + c * (D + 1) + i
                        : POSITION_EMBEDDING + c * 2 * KMAX + position(i - D - 1, K)] = value;
        }

    for (int l = 0; l < L; l++) {
        const float* block = params + BLOCKS + l * BLOCK_SIZE;
        float* out = grad + BLOCKS + l * BLOCK_SIZE;
        for (int r = 0; r < 3 * C; r++) {
            const int64_t row = QKV + int64_t(qkv_row(r)) * C;
            unfold_row(out + row, out + ATTENTION_NORM, block + row, block + ATTENTION_NORM, sum.qkv[l][r],
                       sum.qkv_bias[l][r], qkv_scale(r));
        }
        for (int f = 0; f < F; f++) {
            const int64_t row = UP + int64_t(f) * C;
            unfold_row(out + row, out + MLP_NORM, block + row, block + MLP_NORM, sum.up[l][f], sum.up_bias[l][f], 1.0f);
            out[UP_BIAS + f] = sum.up_bias[l][f];
        }
        for (int c = 0; c < C; c++) {
            if (OUTPUT_MAP) std::copy_n(sum.output[l][c], C, out + OUTPUT + int64_t(c) * C);
            std::copy_n(sum.down[l][c], F, out + DOWN + int64_t(c) * F);
            out[DOWN_BIAS + c] = sum.down_bias[l][c];
        }
    }
    unfold_row(grad + UNEMBEDDING, grad + FINAL_NORM, params + UNEMBEDDING, params + FINAL_NORM, sum.head,
               sum.head_bias, 1.0f);
    grad[UNEMBEDDING_BIAS] = sum.head_bias;
}

// ==== Slices and threads ==================================================================================

template <class T_>
constexpr size_t aligned() {
    return (sizeof(T_) + 63) / 64 * 64;
}

// work(slice, scratch, first sequence, end) for every slice of the batch, on so many threads.
template <class Work>
void for_slices(int64_t batch, int threads, char* scratches, const Work& work) {
    const int64_t tiles = (batch + LANES - 1) / LANES;
    std::atomic<int> next{0};
    const auto take = [&](int thread) {
        Scratch& scratch = *reinterpret_cast<Scratch*>(scratches + thread * aligned<Scratch>());
        for (int s; (s = next++) < SLICES;) work(s, scratch, s * tiles / SLICES * LANES, (s + 1) * tiles / SLICES * LANES);
    };
    std::vector<std::thread> others;
    try {
        for (int thread = 1; thread < threads; thread++) others.emplace_back(take, thread);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run, and this one, do all the slices.
    }
    take(0);
    for (auto& other : others) other.join();
}

void reduce_lanes(float* to, const vec* from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] = sum_lanes(from[i]);
}

void run_slice(Scratch& w, Gradients& grads, float* losses, const Weights& folded, const float* params, const float* xs,
               const float* ys, int64_t begin, int64_t end, int64_t batch, int K) {
    std::memset(&grads, 0, sizeof grads);
    std::memset(&w.sums, 0, sizeof w.sums);
    const float scale = 1.0f / (float(batch) * K);
    for (int64_t first = begin; first < end; first += LANES) {
        load(w, xs, ys, first, batch, K);
        forward(w, folded, params, K);
        score(w, folded, scale, K);
        backward(w, grads, folded, params, K);
    }
    reduce_lanes(grads.embedding[0], w.sums.embedding[0], C * R);
    reduce_lanes(grads.first[0], w.sums.first[0], 3 * C * R);
    reduce_lanes(grads.qkv_bias[0], w.sums.qkv_bias[0], L * 3 * C);
    reduce_lanes(grads.up_bias[0], w.sums.up_bias[0], L * F);
    reduce_lanes(grads.down_bias[0], w.sums.down_bias[0], L * C);
    reduce_lanes(grads.head, w.sums.head, C);
    reduce_lanes(&grads.head_bias, &w.sums.head_bias, 1);
    reduce_lanes(losses, w.sums.losses, K);
}

}  // namespace

extern "C" {

int64_t parameter_count() { return PARAMETERS; }

// Bytes of the workspace, which must be aligned to 64 bytes and may hold anything.
int64_t workspace_size(int threads) {
    return aligned<Weights>() + SLICES * aligned<Gradients>() + threads * aligned<Scratch>();
}

// losses (K): mean over the batch of each squared error; grad (P): gradient of the mean of `losses`. params (P), xs
// (B,K,D), ys (B,K,1), all contiguous.
void loss_and_grad(const float* params, const float* xs, const float* ys, int64_t batch, int K, int threads,
                   char* workspace, float* losses, float* grad) {
    Weights& folded = *reinterpret_cast<Weights*>(workspace);
    char *slices = workspace + aligned<Weights>(), *scratches = slices + SLICES * aligned<Gradients>();
    float slice_losses[SLICES][KMAX];
    fold(folded, params, K);
    for_slices(batch, threads, scratches, [&](int s, Scratch& scratch, int64_t begin, int64_t end) {
        run_slice(scratch, *reinterpret_cast<Gradients*>(slices + s * aligned<Gradients>()), slice_losses[s], folded,
                  params, xs, ys, begin, end, batch, K);
    });

    float* total = reinterpret_cast<float*>(slices);
    for (int s = 1; s < SLICES; s++) {
        const float* more = reinterpret_cast<const float*>(slices + s * aligned<Gradients>());
        for (size_t i = 0; i < sizeof(Gradients) / sizeof(float); i++) total[i] += more[i];
    }
    for (int k = 0; k < K; k++) {
        double loss = 0;
        for (int s = 0; s < SLICES; s++) loss += slice_losses[s][k];
        losses[k] = float(loss / double(batch));
    }
    unfold(grad, *reinterpret_cast<Gradients*>(slices), folded, params, K);
}

// predictions (B,K); the rest as above.
void predictions(const float* params, const float* xs, const float* ys, int64_t batch, int K, int threads,
                 char* workspace, float* out) {
    Weights& folded = *reinterpret_cast<Weights*>(workspace);
    fold(folded, params, K);
    char* scratches = workspace + aligned<Weights>() + SLICES * aligned<Gradients>();
    for_slices(batch, threads, scratches, [&](int, Scratch& scratch, int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += LANES) {
            load(scratch, xs, ys, first, batch, K);
            forward(scratch, folded, params, K);
            for (int k = 0; k < K; k++) {
                const vec value = prediction(scratch, folded, k);
                for (int lane = 0; lane < LANES && first + lane < batch; lane++) out[(first + lane) * K + k] = value[lane];
            }
        }
    });
}
}
