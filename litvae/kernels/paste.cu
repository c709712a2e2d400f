// Written by `make export` from nbs/kernels/07_paste.ipynb; edit that.

// Where pixel j of `count` reads a glimpse of `size` pixels, for a box with 1/scale `inverse` and shift t; in pixels.
__device__ inline float paste_position(float inverse, float t, int j, int count, int size) {
    float place = (2.0f * j + 1.0f) / count - 1.0f;
    return (((place - t) * inverse + 1.0f) * size - 1.0f) / 2.0f;
}

// 1 / scale; 0 stands for a box without an area, which pastes nothing.
__device__ inline float inverse_scale(float s) { return fabsf(s) >= 1e-6f ? 1.0f / s : 0.0f; }

// A reading: (1 - share) of the pixel `first`, share of the next one; `first` is -2 if both lie outside.
struct Tap { int first; float share; };

__device__ inline Tap paste_tap(float inverse, float t, int j, int count, int size) {
    float position = paste_position(inverse, t, j, count, size);
    if (inverse == 0.0f || !(position > -1.0f && position < size)) return Tap{-2, 0.0f};
    float first = floorf(position);
    return Tap{(int)first, position - first};
}

enum Weights { SUM, SOFTMAX, SHARE };

// What a box shows at a place: values 0 to C-1 are the colours times alpha, C is alpha, C+1 the score.
template <int C> struct Reading { float value[C + 2], along_x[C + 2], along_y[C + 2], by_nearness; };

template <int C>
__device__ inline Reading<C> read(const float* glimpse, const float* alpha, float nearness, int weights, float lowest,
                                  Tap y, Tap x, int h, int w) {
    Reading<C> out;
    for (int l = 0; l < C + 2; ++l) out.value[l] = out.along_x[l] = out.along_y[l] = 0.0f;
    out.by_nearness = 0.0f;
    for (int corner = 0; corner < 4; ++corner) {
        int right = corner % 2, below = corner / 2, row = y.first + below, column = x.first + right;
        if (row < 0 || row >= h || column < 0 || column >= w) continue;
        float part_x = right ? x.share : 1.0f - x.share, part_y = below ? y.share : 1.0f - y.share;
        float a = alpha[row * w + column], layers[C + 2];
        for (int c = 0; c < C; ++c) layers[c] = a * glimpse[(c * h + row) * w + column];
        layers[C] = a;
        layers[C + 1] = weights == SHARE ? fmaxf(nearness * a, lowest) : nearness * a;
        for (int l = 0; l < C + 2; ++l) {
            out.value[l] += part_x * part_y * layers[l];
            out.along_x[l] += (right ? part_y : -part_y) * layers[l];
            out.along_y[l] += (below ? part_x : -part_x) * layers[l];
        }
        if (weights != SHARE || nearness * a >= lowest) out.by_nearness += part_x * part_y * a;
    }
    return out;
}

// Each image has ceil(height * width / block) blocks. statistics: the denominator, then the maximum (softmax only).
template <int C>
__global__ void paste(const float* __restrict__ glimpses, const float* __restrict__ alphas,
                      const float* __restrict__ boxes, const float* __restrict__ nearness, float* __restrict__ pasted,
                      float* __restrict__ statistics, int weights, float lowest, int slots, int h, int w,
                      int height, int width) {
    __shared__ float shown[256][5];
    int pixels = height * width, threads = blockDim.x, blocks = (pixels + threads - 1) / threads;
    int image = blockIdx.x / blocks, pixel = blockIdx.x % blocks * threads + threadIdx.x;
    float sums[C + 1], largest = -3.0e38f, total = 0.0f;
    for (int l = 0; l <= C; ++l) sums[l] = 0.0f;
    int hits = 0;
    for (int start = 0; start < slots; start += threads) {
        __syncthreads();                                            // the portion before has been used by all
        int mine = start + threadIdx.x;
        if (mine < slots) {
            const float* box = boxes + ((size_t)image * slots + mine) * 4;
            shown[threadIdx.x][0] = inverse_scale(box[0]);
            shown[threadIdx.x][1] = inverse_scale(box[1]);
            shown[threadIdx.x][2] = box[2];
            shown[threadIdx.x][3] = box[3];
            shown[threadIdx.x][4] = nearness[(size_t)image * slots + mine];
        }
        __syncthreads();
        for (int k = start; pixel < pixels && k < min(start + threads, slots); ++k) {
            const float* box = shown[k - start];
            Tap x = paste_tap(box[0], box[2], pixel % width, width, w);
            if (x.first == -2) continue;
            Tap y = paste_tap(box[1], box[3], pixel / width, height, h);
            if (y.first == -2) continue;
            size_t number = (size_t)image * slots + k;
            Reading<C> here = read<C>(glimpses + number * C * h * w, alphas + number * h * w, box[4], weights, lowest,
                                      y, x, h, w);
            float part = 1.0f, keep = 1.0f, score = here.value[C + 1];
            if (weights == SOFTMAX) {
                float larger = fmaxf(largest, score);
                keep = expf(largest - larger);
                part = expf(score - larger);
                largest = larger;
            } else if (weights == SHARE) part = score;
            total = keep * total + part;
            for (int l = 0; l <= C; ++l) sums[l] = keep * sums[l] + part * here.value[l];
            ++hits;
        }
    }
    if (pixel >= pixels) return;
    float keep = 1.0f;
    if (weights == SOFTMAX && hits < slots) {
        float larger = fmaxf(largest, 0.0f);
        keep = expf(largest - larger);
        total = keep * total + (slots - hits) * expf(-larger);
        largest = larger;
    }
    if (weights == SHARE) total += 1e-6f;
    if (weights == SUM) total = 1.0f;
    for (int l = 0; l <= C; ++l) pasted[((size_t)image * (C + 1) + l) * pixels + pixel] = keep * sums[l] / total;
    if (weights == SHARE) statistics[(size_t)image * pixels + pixel] = total;
    if (weights == SOFTMAX) {
        statistics[(size_t)image * 2 * pixels + pixel] = total;
        statistics[((size_t)image * 2 + 1) * pixels + pixel] = largest;
    }
}

__device__ inline int planes(int weights) { return weights == SUM ? 0 : weights == SOFTMAX ? 2 : 1; }

// The gradients of what a box shows at a pixel of an image. grad, pasted, statistics: of all images, in planes.
template <int C>
__device__ inline void pixel_backward(const float* grad, const float* pasted, const float* statistics, size_t image,
                                      size_t pixel, int pixels, int weights, const Reading<C>& here, float* out) {
    grad += image * (C + 1) * pixels + pixel;
    pasted += image * (C + 1) * pixels + pixel;
    statistics += image * planes(weights) * pixels + pixel;
    float weight = 1.0f, slope = 0.0f, excess = 0.0f;
    if (weights == SOFTMAX) slope = weight = expf(here.value[C + 1] - statistics[pixels]) / statistics[0];
    if (weights == SHARE) {
        slope = 1.0f / statistics[0];
        weight = here.value[C + 1] * slope;
    }
    for (int l = 0; l <= C; ++l) {
        float g = grad[(size_t)l * pixels];
        excess += g * (here.value[l] - pasted[(size_t)l * pixels]);
        out[l] = weight * g;
    }
    out[C + 1] = slope * excess;
}

// The pixels from..to of `count` that read a glimpse of `size` pixels between its places a < b, and few others.
struct Range { int from, to; };

__device__ inline Range pixels_between(float s, float t, float a, float b, int count, int size) {
    float start = ((s * ((2.0f * a + 1.0f) / size - 1.0f) + t + 1.0f) * count - 1.0f) / 2.0f;
    float end = ((s * ((2.0f * b + 1.0f) / size - 1.0f) + t + 1.0f) * count - 1.0f) / 2.0f;
    float from = fmaxf(fminf(start, end) - 0.5f, 0.0f), to = fminf(fmaxf(start, end) + 0.5f, count - 1.0f);
    return from <= to ? Range{(int)from, (int)to} : Range{0, -1};
}

template <int C>
__global__ void paste_boxes_backward(const float* __restrict__ grad, const float* __restrict__ pasted,
                                     const float* __restrict__ statistics, const float* __restrict__ glimpses,
                                     const float* __restrict__ alphas, const float* __restrict__ boxes,
                                     const float* __restrict__ nearness, float* __restrict__ out_boxes,
                                     float* __restrict__ out_nearness, int weights, float lowest, int slots,
                                     int h, int w, int height, int width) {
    size_t number = blockIdx.x, image = blockIdx.x / slots;
    const float* box = boxes + number * 4;
    int pixels = height * width;
    float inverse_x = inverse_scale(box[0]), inverse_y = inverse_scale(box[1]);
    Range columns = pixels_between(box[0], box[2], -1.0f, w, width, w);
    Range rows = pixels_between(box[1], box[3], -1.0f, h, height, h);
    int wide = columns.to - columns.from + 1, count = wide * (rows.to - rows.from + 1);
    float sums[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int column = columns.from + i % wide, row = rows.from + i / wide;
        Tap x = paste_tap(inverse_x, box[2], column, width, w), y = paste_tap(inverse_y, box[3], row, height, h);
        if (x.first == -2 || y.first == -2) continue;
        Reading<C> here = read<C>(glimpses + number * C * h * w, alphas + number * h * w, nearness[number], weights,
                                  lowest, y, x, h, w);
        float handed[C + 2], along_x = 0.0f, along_y = 0.0f;
        pixel_backward<C>(grad, pasted, statistics, image, (size_t)row * width + column, pixels, weights, here, handed);
        for (int l = 0; l < C + 2; ++l) {
            along_x += handed[l] * here.along_x[l];
            along_y += handed[l] * here.along_y[l];
        }
        along_x *= -0.5f * w * inverse_x;
        along_y *= -0.5f * h * inverse_y;
        sums[0] += along_x * (((2.0f * column + 1.0f) / width - 1.0f - box[2]) * inverse_x);
        sums[1] += along_y * (((2.0f * row + 1.0f) / height - 1.0f - box[3]) * inverse_y);
        sums[2] += along_x;
        sums[3] += along_y;
        sums[4] += handed[C + 1] * here.by_nearness;
    }
    for (int n = 0; n < 5; ++n) {
        float sum = block_sum(sums[n]);
        if (threadIdx.x == 0) (n < 4 ? out_boxes[number * 4 + n] : out_nearness[number]) = sum;
    }
}

// count: batch * slots * h * w.
template <int C>
__global__ void paste_glimpses_backward(const float* __restrict__ grad, const float* __restrict__ pasted,
                                        const float* __restrict__ statistics, const float* __restrict__ glimpses,
                                        const float* __restrict__ alphas, const float* __restrict__ boxes,
                                        const float* __restrict__ nearness, float* __restrict__ out_glimpses,
                                        float* __restrict__ out_alphas, int weights, float lowest, int slots,
                                        int h, int w, int height, int width, int count) {
    int index = thread_index();
    if (index >= count) return;
    int place = index % (h * w), j = place % w, i = place / w, pixels = height * width;
    size_t number = index / (h * w), image = number / slots;
    const float* box = boxes + number * 4;
    const float* glimpse = glimpses + number * C * h * w;
    const float* alpha = alphas + number * h * w;
    float inverse_x = inverse_scale(box[0]), inverse_y = inverse_scale(box[1]), sums[C + 2];
    for (int l = 0; l < C + 2; ++l) sums[l] = 0.0f;
    Range columns = pixels_between(box[0], box[2], j - 1.0f, j + 1.0f, width, w);
    Range rows = pixels_between(box[1], box[3], i - 1.0f, i + 1.0f, height, h);
    for (int row = rows.from; row <= rows.to; ++row) {
        Tap y = paste_tap(inverse_y, box[3], row, height, h);
        float part_y = y.first == i ? 1.0f - y.share : y.first + 1 == i ? y.share : 0.0f;
        if (part_y == 0.0f) continue;
        for (int column = columns.from; column <= columns.to; ++column) {
            Tap x = paste_tap(inverse_x, box[2], column, width, w);
            float part = part_y * (x.first == j ? 1.0f - x.share : x.first + 1 == j ? x.share : 0.0f);
            if (part == 0.0f) continue;
            Reading<C> here = read<C>(glimpse, alpha, nearness[number], weights, lowest, y, x, h, w);
            float handed[C + 2];
            pixel_backward<C>(grad, pasted, statistics, image, (size_t)row * width + column, pixels, weights, here,
                              handed);
            for (int l = 0; l < C + 2; ++l) sums[l] += part * handed[l];
        }
    }
    float a = alpha[place], out = sums[C];
    if (weights != SHARE || nearness[number] * a >= lowest) out += nearness[number] * sums[C + 1];
    for (int c = 0; c < C; ++c) {
        out_glimpses[(number * C + c) * h * w + place] = a * sums[c];
        out += glimpse[c * h * w + place] * sums[c];
    }
    out_alphas[index] = out;
}
