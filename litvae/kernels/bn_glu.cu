// Written by `make export` from nbs/kernels/08_bn_glu.ipynb; edit that.

// Where number i of a channel lies: it is pixel i % pixels of image i / pixels.
__device__ inline size_t place(int i, int channel, int channels, int pixels) {
    return ((size_t)(i / pixels) * channels + channel) * pixels + i % pixels;
}

// Block k takes numbers k / channels * span .. of channel k % channels. count: numbers of a channel.
__global__ void bn_glu_statistics(const float* __restrict__ x, float* __restrict__ means, float* __restrict__ squares,
                                  int channels, int pixels, int count, int span) {
    __shared__ float mean;
    int channel = blockIdx.x % channels, first = blockIdx.x / channels * span, end = min(first + span, count);
    float sum = 0.0f, square = 0.0f;
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) sum += x[place(i, channel, channels, pixels)];
    sum = block_sum(sum);
    if (threadIdx.x == 0) mean = sum / (end - first);
    __syncthreads();
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
        float away = x[place(i, channel, channels, pixels)] - mean;
        square += away * away;
    }
    square = block_sum(square);
    if (threadIdx.x == 0) { means[blockIdx.x] = mean; squares[blockIdx.x] = square; }
}

// One thread merges the parts of one channel.
__global__ void bn_glu_merge(const float* __restrict__ means, const float* __restrict__ squares,
                             float* __restrict__ mean, float* __restrict__ variance,
                             int channels, int count, int span) {
    int channel = thread_index();
    if (channel >= channels) return;
    float seen = 0.0f, centre = 0.0f, square = 0.0f;
    for (int first = 0, k = channel; first < count; first += span, k += channels) {
        float more = min(span, count - first), total = seen + more, away = means[k] - centre;
        centre += away * (more / total);
        square += squares[k] + away * away * (seen * (more / total));
        seen = total;
    }
    mean[channel] = centre;
    variance[channel] = square / count;
}

// A standardised number, and after weight and bias.
__device__ inline float standardised(float x, float mean, float variance, float eps) {
    return (x - mean) * rsqrtf(variance + eps);
}
__device__ inline float opening(float x) { return 1.0f / (1.0f + expf(-x)); }

// count: numbers of y, of which (channels / 2) * pixels belong to an image.
__global__ void bn_glu(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                       const float* __restrict__ mean, const float* __restrict__ variance, float* __restrict__ y,
                       int channels, int pixels, int count, float eps) {
    int i = thread_index();
    if (i >= count) return;
    int half = channels / 2, c = i / pixels % half, other = c + half;
    size_t at = (size_t)(i / pixels / half) * channels * pixels + (size_t)c * pixels + i % pixels;
    float signal = standardised(x[at], mean[c], variance[c], eps) * weight[c] + bias[c];
    float gate = standardised(x[at + (size_t)half * pixels], mean[other], variance[other], eps);
    gate = gate * weight[other] + bias[other];
    y[i] = signal * opening(gate);
}

// A signal and its gate, standardised, and their gradients behind weight and bias.
struct Pair { float a, q, da, dq; };

__device__ inline Pair gradients(float g, float a, float q, float weight_a, float bias_a,
                                 float weight_q, float bias_q) {
    float open = opening(q * weight_q + bias_q), da = g * open;
    Pair pair = {a, q, da, da * (a * weight_a + bias_a) * (1.0f - open)};
    return pair;
}

// Block k takes a chunk of channel pair k % half. sums: planes of da, da * a, dq, dq * q, a number for each block.
__global__ void bn_glu_backward_sums(const float* __restrict__ grad, const float* __restrict__ x,
                                     const float* __restrict__ weight, const float* __restrict__ bias,
                                     const float* __restrict__ mean, const float* __restrict__ variance,
                                     float* __restrict__ sums, int half, int pixels, int count, int span, float eps) {
    int c = blockIdx.x % half, o = c + half, first = blockIdx.x / half * span, end = min(first + span, count);
    float da = 0.0f, daa = 0.0f, dq = 0.0f, dqq = 0.0f;
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
        float a = standardised(x[place(i, c, 2 * half, pixels)], mean[c], variance[c], eps);
        float q = standardised(x[place(i, o, 2 * half, pixels)], mean[o], variance[o], eps);
        Pair pair = gradients(grad[place(i, c, half, pixels)], a, q, weight[c], bias[c], weight[o], bias[o]);
        da += pair.da;
        daa += pair.da * a;
        dq += pair.dq;
        dqq += pair.dq * q;
    }
    da = block_sum(da);
    daa = block_sum(daa);
    dq = block_sum(dq);
    dqq = block_sum(dqq);
    if (threadIdx.x == 0) {
        size_t all = gridDim.x, k = blockIdx.x;
        sums[k] = da;
        sums[all + k] = daa;
        sums[2 * all + k] = dq;
        sums[3 * all + k] = dqq;
    }
}

// Thread i adds the chunks of one of 4 * half sums: gradients of bias and weight, signals and then gates.
__global__ void bn_glu_backward_merge(const float* __restrict__ sums, float* __restrict__ dweight,
                                      float* __restrict__ dbias, int half, int chunks) {
    int i = thread_index();
    if (i >= 4 * half) return;
    int kind = i / half, c = i % half;
    float sum = 0.0f;
    for (int k = 0; k < chunks; ++k) sum += sums[((size_t)kind * chunks + k) * half + c];
    if (kind % 2) dweight[kind / 2 * half + c] = sum;
    else dbias[kind / 2 * half + c] = sum;
}

// part: 1 / numbers of a channel, or 0 where mean and variance were given. count: pairs.
__global__ void bn_glu_backward(const float* __restrict__ grad, const float* __restrict__ x,
                                const float* __restrict__ weight, const float* __restrict__ bias,
                                const float* __restrict__ mean, const float* __restrict__ variance,
                                const float* __restrict__ dweight, const float* __restrict__ dbias,
                                float* __restrict__ dx, int half, int pixels, int count, float part, float eps) {
    int i = thread_index();
    if (i >= count) return;
    int c = i / pixels % half, o = c + half;
    size_t at = ((size_t)(i / pixels / half) * 2 * half + c) * pixels + i % pixels, to = at + (size_t)half * pixels;
    float a = standardised(x[at], mean[c], variance[c], eps), q = standardised(x[to], mean[o], variance[o], eps);
    Pair pair = gradients(grad[i], a, q, weight[c], bias[c], weight[o], bias[o]);
    dx[at] = weight[c] * rsqrtf(variance[c] + eps) * (pair.da - part * (dbias[c] + a * dweight[c]));
    dx[to] = weight[o] * rsqrtf(variance[o] + eps) * (pair.dq - part * (dbias[o] + q * dweight[o]));
}

__global__ void elu(const float* __restrict__ x, float* __restrict__ y, int count) {
    int i = thread_index();
    if (i < count) y[i] = x[i] > 0.0f ? x[i] : expm1f(x[i]);
}
__global__ void elu_backward(const float* __restrict__ grad, const float* __restrict__ x, float* __restrict__ dx,
                             int count) {
    int i = thread_index();
    if (i < count) dx[i] = x[i] > 0.0f ? grad[i] : grad[i] * expf(x[i]);
}
