/* Batch norm in a training step on a CPU, with the addition of the shortcut and ReLU. Activations are channels-last:
   rows of channels, a multiple of LANES in number.

   Each tile of rows is summed separately and the tiles are combined in their order, so that the result does not depend
   on the number of threads. The file is compiled for OpenMP and linked without it. Its functions come from the copy
   that PyTorch has loaded, because the threads of a second copy would compete with those of the first. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, UNROLL = 4, TILE_VALUES = 8192, MIN_TILE_ROWS = 64 };

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Condition __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

typedef struct {
    /* Activations and their gradients: [rows][channels] of float, or of bfloat16 where `bf16` is set. */
    const void *x, *shortcut;     /* shortcut: or null */
    void *y;                      /* written forward; read backward, or null where there was no shortcut */
    const void *grad_y;           /* read backward */
    void *grad_x, *grad_shortcut; /* written backward; grad_shortcut: or null */
    /* [channels] */
    const float *weight, *bias;
    float *running_mean, *running_var; /* updated forward */
    float *mean, *inverse_std;         /* of this batch: written forward, read backward */
    float *grad_weight, *grad_bias;    /* written backward */
    int64_t rows, channels, relu, bf16;
    double momentum, epsilon;
} Norm;

#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const void *values, int64_t at, int bf16)
{
    if (bf16) {
        Halves halves;
        memcpy(&halves, (const uint16_t *)values + at, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
    }
    Floats floats;
    memcpy(&floats, (const float *)values + at, sizeof floats);
    return floats;
}

INLINE void store(void *values, int64_t at, Floats floats, int bf16)
{
    if (bf16) { /* to nearest, ties to even */
        const Words bits = (Words)floats;
        const Halves halves = __builtin_convertvector((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, Halves);
        memcpy((uint16_t *)values + at, &halves, sizeof halves);
    } else
        memcpy((float *)values + at, &floats, sizeof floats);
}

INLINE Floats zero_where(Condition condition, Floats floats)
{
    return (Floats)(~condition & (Condition)floats);
}

INLINE Floats sum(const Floats *parts)
{
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

/* Compute the mean of `count` rows from `row` on and LANES channels from `c` on, and the sum of squared deviations. */
INLINE void count_up(const Norm norm, int64_t row, int64_t count, int64_t c, float *partial, int bf16)
{
    const int64_t start = row * norm.channels + c;
    Floats sums[UNROLL] = {0}, squares[UNROLL] = {0};
    for (int64_t i = 0; i < count; i += UNROLL)
        for (int k = 0; k < UNROLL && i + k < count; k++)
            sums[k] += load(norm.x, start + (i + k) * norm.channels, bf16);
    const Floats mean = sum(sums) / (float)count;
    for (int64_t i = 0; i < count; i += UNROLL)
        for (int k = 0; k < UNROLL && i + k < count; k++) {
            const Floats deviation = load(norm.x, start + (i + k) * norm.channels, bf16) - mean;
            squares[k] += deviation * deviation;
        }
    store(partial, c, mean, 0);
    store(partial, norm.channels + c, sum(squares), 0);
}

/* Values of LANES channels, from the forward pass. */
typedef struct {
    Floats mean, inverse_std, scale, bias;
} Line;

INLINE Line line(const Norm norm, int64_t c)
{
    const Floats inverse_std = load(norm.inverse_std, c, 0);
    return (Line){load(norm.mean, c, 0), inverse_std, load(norm.weight, c, 0) * inverse_std, load(norm.bias, c, 0)};
}

INLINE void normalize(const Norm norm, int64_t row, int64_t count, int64_t c, float *unused, int bf16)
{
    (void)unused;
    const Line of = line(norm, c);
    for (int64_t i = 0, at = row * norm.channels + c; i < count; i++, at += norm.channels) {
        Floats y = (load(norm.x, at, bf16) - of.mean) * of.scale + of.bias;
        if (norm.shortcut)
            y += load(norm.shortcut, at, bf16);
        store(norm.y, at, norm.relu ? zero_where(y < 0, y) : y, bf16); /* NaN stays NaN */
    }
}

/* Compute the gradient before ReLU. Without a shortcut, the output is computed again: reading it would take longer. */
INLINE Floats gradient(const Norm norm, int64_t at, Floats deviation, Line of, int bf16)
{
    const Floats grad = load(norm.grad_y, at, bf16);
    if (!norm.relu)
        return grad;
    return zero_where((norm.y ? load(norm.y, at, bf16) : deviation * of.scale + of.bias) <= 0, grad);
}

/* Sum the gradient, and the gradient times the deviation from the mean. */
INLINE void count_up_gradients(const Norm norm, int64_t row, int64_t count, int64_t c, float *partial, int bf16)
{
    const Line of = line(norm, c);
    Floats sums[UNROLL] = {0}, products[UNROLL] = {0};
    for (int64_t i = 0; i < count; i += UNROLL)
        for (int k = 0; k < UNROLL && i + k < count; k++) {
            const int64_t at = (row + i + k) * norm.channels + c;
            const Floats deviation = load(norm.x, at, bf16) - of.mean;
            const Floats grad = gradient(norm, at, deviation, of, bf16);
            if (norm.grad_shortcut)
                store(norm.grad_shortcut, at, grad, bf16);
            sums[k] += grad;
            products[k] += grad * deviation;
        }
    store(partial, c, sum(sums), 0);
    store(partial, norm.channels + c, sum(products), 0);
}

INLINE void propagate(const Norm norm, int64_t row, int64_t count, int64_t c, float *unused, int bf16)
{
    (void)unused;
    const Line of = line(norm, c);
    const Floats mean_grad = load(norm.grad_bias, c, 0) / (float)norm.rows;
    const Floats slope = load(norm.grad_weight, c, 0) * of.inverse_std / (float)norm.rows;
    for (int64_t i = 0, at = row * norm.channels + c; i < count; i++, at += norm.channels) {
        const Floats deviation = load(norm.x, at, bf16) - of.mean;
        const Floats grad =
            norm.grad_shortcut ? load(norm.grad_shortcut, at, bf16) : gradient(norm, at, deviation, of, bf16);
        store(norm.grad_x, at, (grad - mean_grad - deviation * slope) * of.scale, bf16);
    }
}

/* Combine tiles as in Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983. */
static void finish_statistics(const Norm *norm, int64_t c, const float *partial, int64_t tile)
{
    double count = 0, mean = 0, squares = 0;
    for (int64_t row = 0; row < norm->rows; row += tile, partial += 2 * norm->channels) {
        const double size = norm->rows - row < tile ? norm->rows - row : tile;
        const double delta = partial[c] - mean, share = size / (count + size);
        mean += delta * share;
        squares += partial[norm->channels + c] + delta * delta * count * share;
        count += size;
    }
    norm->mean[c] = mean;
    norm->inverse_std[c] = 1 / __builtin_sqrt(squares / count + norm->epsilon);
    norm->running_mean[c] += norm->momentum * (mean - norm->running_mean[c]);
    norm->running_var[c] += norm->momentum * (squares / (count - 1) - norm->running_var[c]);
}

static void finish_gradients(const Norm *norm, int64_t c, const float *partial, int64_t tile)
{
    double sum = 0, product = 0;
    for (int64_t row = 0; row < norm->rows; row += tile, partial += 2 * norm->channels) {
        sum += partial[c];
        product += partial[norm->channels + c];
    }
    norm->grad_bias[c] = sum;
    norm->grad_weight[c] = product * norm->inverse_std[c];
}

#define FOR_ALL_TILES(function)                                                                                        \
    _Pragma("omp for schedule(static)") for (int64_t row = 0; row < norm->rows; row += tile)                           \
    {                                                                                                                  \
        const int64_t count = norm->rows - row < tile ? norm->rows - row : tile;                                       \
        float *partial = partials + row / tile * 2 * norm->channels;                                                   \
        for (int64_t c = 0; c < norm->channels; c += LANES)                                                            \
            if (norm->bf16)                                                                                            \
                function(*norm, row, count, c, partial, 1);                                                            \
            else                                                                                                       \
                function(*norm, row, count, c, partial, 0);                                                            \
    }

/* Return 0, or 1 where there is no memory. */
#define DEFINE_PASS(NAME, COUNT, FINISH, WRITE)                                                                        \
    int NAME(const Norm *norm)                                                                                         \
    {                                                                                                                  \
        const int64_t fit = TILE_VALUES / norm->channels, tile = fit > MIN_TILE_ROWS ? fit : MIN_TILE_ROWS;            \
        float *partials = malloc((norm->rows / tile + 1) * 2 * norm->channels * sizeof *partials);                     \
        if (!partials)                                                                                                 \
            return 1;                                                                                                  \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            FOR_ALL_TILES(COUNT)                                                                                       \
            _Pragma("omp for schedule(static)") for (int64_t c = 0; c < norm->channels; c++)                           \
                FINISH(norm, c, partials, tile);                                                                       \
            FOR_ALL_TILES(WRITE)                                                                                       \
        }                                                                                                              \
        free(partials);                                                                                                \
        return 0;                                                                                                      \
    }

DEFINE_PASS(forward, count_up, finish_statistics, normalize)
DEFINE_PASS(backward, count_up_gradients, finish_gradients, propagate)
