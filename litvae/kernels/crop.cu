// Written by `make export` from nbs/kernels/06_crop.ipynb; edit that.

// Where sample j of `count` reads an axis of `size` pixels, for a box of scale s and shift t; in pixels.
__device__ inline float crop_position(float s, float t, int j, int count, int size) {
    float place = (2.0f * j + 1.0f) / count - 1.0f;
    return ((s * place + t + 1.0f) * size - 1.0f) / 2.0f;
}

// A reading: (1 - share) of the pixel `first`, share of the next one.
struct Tap { int first; float share; };

__device__ inline Tap tap_at(float position, int size) {
    if (!(position > -1.0f && position < size)) return Tap{-2, 0.0f};      // both pixels lie outside
    float first = floorf(position);
    return Tap{(int)first, position - first};
}

__device__ inline float pixel_or_zero(const float* image, int y, int x, int height, int width) {
    return y >= 0 && y < height && x >= 0 && x < width ? image[(size_t)y * width + x] : 0.0f;
}

// images: (batch, channels, height, width); boxes: (batch * slots, 4); glimpses: (batch * slots, channels, h, w);
// count: of all places, batch * slots * h * w.
__global__ void crop(const float* __restrict__ images, const float* __restrict__ boxes, float* __restrict__ glimpses,
                     int slots, int channels, int height, int width, int h, int w, int count) {
    int i = thread_index();
    if (i >= count) return;
    int number = i / (h * w), place = i % (h * w);
    const float* box = boxes + (size_t)number * 4;
    Tap x = tap_at(crop_position(box[0], box[2], place % w, w, width), width);
    Tap y = tap_at(crop_position(box[1], box[3], place / w, h, height), height);
    const float* image = images + (size_t)(number / slots) * channels * height * width;
    float* out = glimpses + (size_t)number * channels * h * w + place;
    for (int c = 0; c < channels; ++c, image += (size_t)height * width, out += h * w) {
        float top = (1.0f - x.share) * pixel_or_zero(image, y.first, x.first, height, width)
                    + x.share * pixel_or_zero(image, y.first, x.first + 1, height, width);
        float bottom = (1.0f - x.share) * pixel_or_zero(image, y.first + 1, x.first, height, width)
                       + x.share * pixel_or_zero(image, y.first + 1, x.first + 1, height, width);
        *out = (1.0f - y.share) * top + y.share * bottom;
    }
}

__global__ void crop_boxes_backward(const float* __restrict__ grad, const float* __restrict__ images,
                                    const float* __restrict__ boxes, float* __restrict__ out,
                                    int slots, int channels, int height, int width, int h, int w) {
    int number = blockIdx.x;
    const float* box = boxes + (size_t)number * 4;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int place = threadIdx.x; place < h * w; place += blockDim.x) {
        int j = place % w, i = place / w;
        Tap x = tap_at(crop_position(box[0], box[2], j, w, width), width);
        Tap y = tap_at(crop_position(box[1], box[3], i, h, height), height);
        const float* image = images + (size_t)(number / slots) * channels * height * width;
        const float* g = grad + (size_t)number * channels * h * w + place;
        float along_x = 0.0f, along_y = 0.0f;
        for (int c = 0; c < channels; ++c, image += (size_t)height * width, g += h * w) {
            float v00 = pixel_or_zero(image, y.first, x.first, height, width);
            float v01 = pixel_or_zero(image, y.first, x.first + 1, height, width);
            float v10 = pixel_or_zero(image, y.first + 1, x.first, height, width);
            float v11 = pixel_or_zero(image, y.first + 1, x.first + 1, height, width);
            along_x += *g * ((1.0f - y.share) * (v01 - v00) + y.share * (v11 - v10));
            along_y += *g * ((1.0f - x.share) * (v10 - v00) + x.share * (v11 - v01));
        }
        along_x *= 0.5f * width;
        along_y *= 0.5f * height;
        sums[0] += along_x * ((2.0f * j + 1.0f) / w - 1.0f);
        sums[1] += along_y * ((2.0f * i + 1.0f) / h - 1.0f);
        sums[2] += along_x;
        sums[3] += along_y;
    }
    for (int n = 0; n < 4; ++n) {
        float sum = block_sum(sums[n]);
        if (threadIdx.x == 0) out[(size_t)number * 4 + n] = sum;
    }
}

// The samples from..to among which are all that read pixel `x` of an axis; none if to < from.
struct Range { int from, to; };

__device__ inline Range readers(float s, float t, int x, int count, int size) {
    float first = crop_position(s, t, 0, count, size), last = crop_position(s, t, count - 1, count, size);
    if (!(fminf(first, last) < x + 1.01f && fmaxf(first, last) > x - 1.01f)) return Range{0, -1};
    float step = count > 1 ? (last - first) / (count - 1) : 0.0f;
    if (fabsf(step) < 1e-3f) return Range{0, count - 1};
    float a = (x - 1.0f - first) / step, b = (x + 1.0f - first) / step;
    return Range{(int)fmaxf(fminf(a, b) - 0.5f, 0.0f), (int)fminf(fmaxf(a, b) + 0.5f, count - 1.0f)};
}

__device__ inline float share_of(Tap tap, int x) {
    return tap.first == x ? 1.0f - tap.share : tap.first + 1 == x ? tap.share : 0.0f;
}

// count: batch * channels * height * width, one thread for each number of the gradient.
__global__ void crop_images_backward(const float* __restrict__ grad, const float* __restrict__ boxes,
                                     float* __restrict__ out, int slots, int channels, int height, int width,
                                     int h, int w, int count) {
    int i = thread_index();
    if (i >= count) return;
    int x = i % width, y = i / width % height, plane = i / (width * height), c = plane % channels;
    float sum = 0.0f;
    for (int k = 0; k < slots; ++k) {
        size_t number = (size_t)(plane / channels) * slots + k;
        const float* box = boxes + number * 4;
        Range columns = readers(box[0], box[2], x, w, width);
        if (columns.to < columns.from) continue;
        Range rows = readers(box[1], box[3], y, h, height);
        for (int row = rows.from; row <= rows.to; ++row) {
            float part = 0.0f;
            const float* g = grad + ((number * channels + c) * h + row) * w;
            for (int column = columns.from; column <= columns.to; ++column)
                part += g[column] * share_of(tap_at(crop_position(box[0], box[2], column, w, width), width), x);
            sum += part * share_of(tap_at(crop_position(box[1], box[3], row, h, height), height), y);
        }
    }
    out[i] = sum;
}
