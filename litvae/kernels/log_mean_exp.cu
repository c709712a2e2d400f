// Written by `make export` from nbs/kernels/11_log_mean_exp.ipynb; edit that.

// log N(z; mean, std^2) of one code under one component, without the constant D/2 log 2 pi.
__device__ inline float log_density(const float* z, const float* mean, const float* std, int size) {
    float squares = 0.0f, logs = 0.0f;
    for (int d = 0; d < size; ++d) {
        float scaled = (z[d] - mean[d]) / std[d];
        squares += scaled * scaled;
        logs += logf(std[d]);
    }
    return -0.5f * squares - logs;
}

// offset: log N + D/2 log 2 pi, what is subtracted in the end.
__global__ void log_mean_exp_normal(const float* __restrict__ z, const float* __restrict__ mean,
                                    const float* __restrict__ std, float* __restrict__ value,
                                    float offset, int codes, int count, int size) {
    int code = thread_index() / 32, lane = threadIdx.x % 32;
    if (code >= codes) return;                               // all lanes of the warp or none
    float top = -3.0e38f, total = 0.0f;                      // the sum is total * exp(top)
    for (int n = lane; n < count; n += 32) {
        float score = log_density(z + (size_t)code * size, mean + (size_t)n * size, std + (size_t)n * size, size);
        float larger = fmaxf(top, score);
        total = total * expf(top - larger) + expf(score - larger);
        top = larger;
    }
    for (int bit = 16; bit > 0; bit /= 2) {
        float other_top = __shfl_xor_sync(0xffffffffu, top, bit);
        float other_total = __shfl_xor_sync(0xffffffffu, total, bit);
        float larger = fmaxf(top, other_top);
        total = total * expf(top - larger) + other_total * expf(other_top - larger);
        top = larger;
    }
    if (lane == 0) value[code] = top + logf(total) - offset;
}

__global__ void log_mean_exp_normal_codes(const float* __restrict__ grad, const float* __restrict__ value,
                                          const float* __restrict__ z, const float* __restrict__ mean,
                                          const float* __restrict__ std, float* __restrict__ z_grad,
                                          float offset, int codes, int count, int size) {
    int code = thread_index() / 32, lane = threadIdx.x % 32;
    if (code >= codes) return;
    const float* mine = z + (size_t)code * size;
    float* sums = z_grad + (size_t)code * size;
    for (int d = lane; d < size; d += 32) sums[d] = 0.0f;
    for (int first = 0; first < count; first += 32) {
        int n = first + lane;
        float share = 0.0f;
        if (n < count) {
            float score = log_density(mine, mean + (size_t)n * size, std + (size_t)n * size, size);
            share = grad[code] * expf(score - offset - value[code]);
        }
        for (int j = 0; j < 32 && first + j < count; ++j) {
            float weight = __shfl_sync(0xffffffffu, share, j);
            size_t row = (size_t)(first + j) * size;
            for (int d = lane; d < size; d += 32)
                sums[d] -= weight * (mine[d] - mean[row + d]) / (std[row + d] * std[row + d]);
        }
    }
}

__global__ void log_mean_exp_normal_components(const float* __restrict__ grad, const float* __restrict__ value,
                                               const float* __restrict__ z, const float* __restrict__ mean,
                                               const float* __restrict__ std, float* __restrict__ mean_grad,
                                               float* __restrict__ std_grad, float offset, int codes, int count,
                                               int size) {
    int n = thread_index() / 32, lane = threadIdx.x % 32;
    if (n >= count) return;
    size_t row = (size_t)n * size;
    for (int d = lane; d < size; d += 32) mean_grad[row + d] = std_grad[row + d] = 0.0f;
    for (int first = 0; first < codes; first += 32) {
        int code = first + lane;
        float share = 0.0f;
        if (code < codes) {
            float score = log_density(z + (size_t)code * size, mean + row, std + row, size);
            share = grad[code] * expf(score - offset - value[code]);
        }
        for (int j = 0; j < 32 && first + j < codes; ++j) {
            float weight = __shfl_sync(0xffffffffu, share, j);
            const float* other = z + (size_t)(first + j) * size;
            for (int d = lane; d < size; d += 32) {
                float inverse = 1.0f / std[row + d], scaled = (other[d] - mean[row + d]) * inverse;
                mean_grad[row + d] += weight * scaled * inverse;
                std_grad[row + d] += weight * (scaled * scaled - 1.0f) * inverse;
            }
        }
    }
}
