// Written by `make export` from nbs/kernels/10_mixture.ipynb; edit that.

// A block adds its errors to sums[image * blocks + block of the image]. precision: 1 / std^2; constant: that of
// one channel. Slot k, channel c of pixel p of image b lies at ((b * K + k) * channels + c) * pixels + p.
template <int K, int GROUP>
__global__ void mixture_nll(
        const float* __restrict__ x, const float* __restrict__ means, const float* __restrict__ log_masks,
        float* __restrict__ sums, float* __restrict__ x_grad, float* __restrict__ means_grad,
        float* __restrict__ masks_grad, float precision, float constant, int groups, int pixels, int blocks) {
    int p = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    size_t b = blockIdx.x / blocks, channels = groups * GROUP, step = pixels;
    float nll = 0.0f;
    if (p < pixels) {
        size_t mask_at = b * K * step + p;
        float log_mask[K], mask_grad[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            log_mask[k] = log_masks[mask_at + k * step];
            mask_grad[k] = 0.0f;
        }
        for (int group = 0; group < groups; ++group) {
            size_t x_at = (b * channels + group * GROUP) * step + p;
            size_t mean_at = (b * K * channels + group * GROUP) * step + p;
            float score[K], away[K][GROUP], x_pull[GROUP], most = -3.0e38f, total = 0.0f;
#pragma unroll
            for (int c = 0; c < GROUP; ++c) x_pull[c] = 0.0f;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float square = 0.0f;
#pragma unroll
                for (int c = 0; c < GROUP; ++c) {
                    away[k][c] = x[x_at + c * step] - means[mean_at + (k * channels + c) * step];
                    square += away[k][c] * away[k][c];
                }
                score[k] = log_mask[k] - 0.5f * precision * square;
                most = fmaxf(most, score[k]);
            }
#pragma unroll
            for (int k = 0; k < K; ++k) {
                score[k] = __expf(score[k] - most);             // at most 1: nothing overflows
                total += score[k];
            }
            nll += GROUP * constant - most - logf(total);
            if (!means_grad) continue;
            float inverse = 1.0f / total;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float share = score[k] * inverse;
                mask_grad[k] -= share;
#pragma unroll
                for (int c = 0; c < GROUP; ++c) {
                    float pull = share * precision * away[k][c];
                    means_grad[mean_at + (k * channels + c) * step] = -pull;
                    x_pull[c] += pull;
                }
            }
            if (!x_grad) continue;
#pragma unroll
            for (int c = 0; c < GROUP; ++c) x_grad[x_at + c * step] = x_pull[c];
        }
        if (masks_grad) {
#pragma unroll
            for (int k = 0; k < K; ++k) masks_grad[mask_at + k * step] = mask_grad[k];
        }
    }
    nll = block_sum(nll);                                       // threads beyond the image bring a zero
    if (threadIdx.x == 0) sums[blockIdx.x] = nll;
}

__global__ void mixture_nll_any(
        const float* __restrict__ x, const float* __restrict__ means, const float* __restrict__ log_masks,
        float* __restrict__ sums, float* __restrict__ x_grad, float* __restrict__ means_grad,
        float* __restrict__ masks_grad, float precision, float constant, int groups, int pixels, int blocks,
        int slots, int group_size) {
    int p = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    size_t b = blockIdx.x / blocks, channels = groups * group_size, step = pixels;
    float nll = 0.0f;
    for (int group = 0; group < groups && p < pixels; ++group) {
        size_t x_at = (b * channels + group * group_size) * step + p;
        float most = -3.0e38f, total = 0.0f, log_total = 0.0f;
        if (x_grad) for (int c = 0; c < group_size; ++c) x_grad[x_at + c * step] = 0.0f;
        for (int walk = 0; walk < (means_grad ? 2 : 1); ++walk) {
            for (int k = 0; k < slots; ++k) {
                size_t mask_at = (b * slots + k) * step + p;
                size_t mean_at = ((b * slots + k) * channels + group * group_size) * step + p;
                float square = 0.0f;
                for (int c = 0; c < group_size; ++c) {
                    float away = x[x_at + c * step] - means[mean_at + c * step];
                    square += away * away;
                }
                float score = log_masks[mask_at] - 0.5f * precision * square;
                if (walk == 0) {
                    float larger = fmaxf(most, score);
                    total = total * __expf(most - larger) + __expf(score - larger);
                    most = larger;
                    continue;
                }
                float share = __expf(score - most - log_total);
                masks_grad[mask_at] = (group ? masks_grad[mask_at] : 0.0f) - share;
                for (int c = 0; c < group_size; ++c) {
                    float pull = share * precision * (x[x_at + c * step] - means[mean_at + c * step]);
                    means_grad[mean_at + c * step] = -pull;
                    if (x_grad) x_grad[x_at + c * step] += pull;
                }
            }
            log_total = logf(total);
        }
        nll += group_size * constant - most - log_total;
    }
    nll = block_sum(nll);
    if (threadIdx.x == 0) sums[blockIdx.x] = nll;
}
