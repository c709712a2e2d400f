// Written by `make export` from nbs/kernels/12_laplace.ipynb; edit that.

// examples: B; pixels: P. Row (s * B + b) of the means belongs to row b of x.
__global__ void absolute_errors(const float* __restrict__ x, const float* __restrict__ means,
                                float* __restrict__ errors, int examples, int pixels) {
    const float* seen = x + (size_t)(blockIdx.x % examples) * pixels;
    const float* mean = means + (size_t)blockIdx.x * pixels;
    float sum = 0.0f;
    for (int p = threadIdx.x; p < pixels; p += blockDim.x) sum += fabsf(seen[p] - mean[p]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) errors[blockIdx.x] = sum;
}

// count: B * P. with_x: whether x_grad is wanted; it has no room otherwise.
__global__ void absolute_errors_backward(const float* __restrict__ grad, const float* __restrict__ x,
                                         const float* __restrict__ means, float* __restrict__ x_grad,
                                         float* __restrict__ means_grad, int with_x, int samples, int examples,
                                         int pixels, int count) {
    int i = thread_index();
    if (i >= count) return;
    int example = i / pixels;
    float seen = x[i], sum = 0.0f;
    size_t at = i;
    for (int s = 0; s < samples; ++s, at += count) {
        float mean = means[at];
        float signed_grad = grad[(size_t)s * examples + example] * ((seen > mean) - (seen < mean));
        means_grad[at] = -signed_grad;
        sum += signed_grad;
    }
    if (with_x) x_grad[i] = sum;
}
