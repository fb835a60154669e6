/* Crop, flip, cutout and normalisation of a batch in one pass over its pixels, on a CPU, bit-exact with `augment.py`.
   Compiled for the host CPU, the loops over bytes become vector instructions. */

#include <stdint.h>
#include <string.h>

enum { SIZE = 32, CHANNELS = 3, ROW = SIZE * CHANNELS, IMAGE = SIZE * ROW };

typedef struct {
    const uint8_t *images;                                       /* [N][SIZE][SIZE][CHANNELS] */
    const int64_t *rows;                                         /* [B] which images */
    const int64_t *top, *left, *flip, *cutout_top, *cutout_left; /* [B] as in sampling.Draws */
    const float *mean, *scale;                                   /* [SIZE][mean_stride] or [ROW], and [ROW] */
    void *out;                                                   /* [B][SIZE][SIZE][CHANNELS] */
    int64_t mean_stride;                                         /* ROW, or 0 where all rows share one mean */
    int64_t padding, reflect, cutout;
    uint8_t fill[CHANNELS]; /* colour of cutout squares */
} Batch;

static inline int64_t reflected(int64_t i)
{
    i = i < 0 ? -i : i;
    return i < SIZE ? i : 2 * (SIZE - 1) - i;
}

static inline int64_t clamped(int64_t i)
{
    return i < 0 ? 0 : i > SIZE ? SIZE : i;
}

static void crop_reflected(uint8_t *out, const uint8_t *image, int64_t down, int64_t right)
{
    for (int64_t y = 0; y < SIZE; y++)
        for (int64_t x = 0; x < SIZE; x++, out += CHANNELS)
            memcpy(out, image + reflected(y + down) * ROW + reflected(x + right) * CHANNELS, CHANNELS);
}

static void crop_zero_padded(uint8_t *out, const uint8_t *image, int64_t down, int64_t right)
{
    const int64_t left = clamped(-right), width = clamped(SIZE - right) - left;
    memset(out, 0, IMAGE);
    for (int64_t y = clamped(-down); y < clamped(SIZE - down); y++)
        memcpy(out + y * ROW + left * CHANNELS, image + (y + down) * ROW + (left + right) * CHANNELS, width * CHANNELS);
}

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

/* Five pixels at a time, reversed by one shuffle; the sixteenth byte belongs to the next group, so both images need a
   spare byte at their end. A third faster than pixel by pixel. */
static void flip(uint8_t *out, const uint8_t *image)
{
    for (int64_t y = 0; y < SIZE; y++, out += ROW, image += ROW) {
        int64_t x = 0;
        for (; x + 5 <= SIZE; x += 5) {
            Bytes16 pixels;
            memcpy(&pixels, image + ROW - (x + 5) * CHANNELS, 16);
            pixels = __builtin_shufflevector(pixels, pixels, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15);
            memcpy(out + x * CHANNELS, &pixels, 16);
        }
        for (; x < SIZE; x++)
            memcpy(out + x * CHANNELS, image + ROW - (x + 1) * CHANNELS, CHANNELS);
    }
}

static void cut_out(uint8_t *image, const uint8_t *fill, int64_t top, int64_t left, int64_t side)
{
    for (int64_t y = clamped(top); y < clamped(top + side); y++)
        for (int64_t x = clamped(left); x < clamped(left + side); x++)
            memcpy(image + y * ROW + x * CHANNELS, fill, CHANNELS);
}

/* The augmented bytes of sample `i`, in one of two buffers. */
static const uint8_t *augment(uint8_t buffers[2][IMAGE + 1], const Batch *batch, int64_t i)
{
    const uint8_t *image = batch->images + batch->rows[i] * IMAGE;
    const int64_t down = batch->top[i] - batch->padding, right = batch->left[i] - batch->padding;
    uint8_t *out = buffers[0];
    (batch->reflect ? crop_reflected : crop_zero_padded)(out, image, down, right);
    if (batch->flip[i])
        flip(out = buffers[1], buffers[0]);
    cut_out(out, batch->fill, batch->cutout_top[i], batch->cutout_left[i], batch->cutout);
    return out;
}

static inline uint16_t to_bf16(float value) /* to nearest, ties to even; `value` is finite */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* One row's mean and scale stay in the first-level cache, a quarter faster than a mean for every pixel if all are the
   same. Images are scattered in memory. The next one is prefetched row by row while this one is converted, a quarter
   faster than all at once, which fills the processor's queue of pending loads. */
#define DEFINE_AUGMENT(NAME, VALUE, CONVERT)                                                                           \
    void NAME(const Batch *batch, int64_t count)                                                                       \
    {                                                                                                                  \
        uint8_t buffers[2][IMAGE + 1] = {{0}};                                                                         \
        VALUE *restrict out = batch->out;                                                                              \
        for (int64_t i = 0; i < count; i++, out += IMAGE) {                                                            \
            const uint8_t *image = augment(buffers, batch, i);                                                         \
            const uint8_t *next = batch->images + batch->rows[i + 1 < count ? i + 1 : i] * IMAGE;                      \
            for (int y = 0; y < SIZE; y++) {                                                                           \
                const int row = y * ROW;                                                                               \
                __builtin_prefetch(next + row);                                                                        \
                __builtin_prefetch(next + row + 64);                                                                   \
                for (int k = 0; k < ROW; k++)                                                                          \
                    out[row + k] = CONVERT(image[row + k], batch->mean[y * batch->mean_stride + k], batch->scale[k]);  \
            }                                                                                                          \
        }                                                                                                              \
    }

#define BYTE(pixel, mean, scale) (pixel)
#define FP32(pixel, mean, scale) (((pixel) - (mean)) * (scale))
#define BF16(pixel, mean, scale) to_bf16(FP32(pixel, mean, scale))
#define FP16(pixel, mean, scale) ((_Float16)FP32(pixel, mean, scale))

DEFINE_AUGMENT(augment_uint8, uint8_t, BYTE)
DEFINE_AUGMENT(augment_float32, float, FP32)
DEFINE_AUGMENT(augment_bfloat16, uint16_t, BF16)
DEFINE_AUGMENT(augment_float16, _Float16, FP16)
