// Written by `make export` from nbs/kernels/02_compiling.ipynb; edit that.

// The index of this thread in the grid.
__device__ inline int thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// The sum of `value` over the 32 threads of a warp, in its first thread.
__device__ inline float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
    return value;
}

// The sum of `value` over a block of at most 1024 threads, a multiple of 32, in its first thread. The order of the
// additions is fixed, so that a repeat gives the same bits. All threads of the block have to call it.
__device__ inline float block_sum(float value) {
    __shared__ float sums[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    value = warp_sum(value);
    __syncthreads();                          // nobody reads the sums of an earlier call any more
    if (lane == 0) sums[warp] = value;
    __syncthreads();
    value = threadIdx.x < blockDim.x / 32 ? sums[lane] : 0.0f;
    return warp == 0 ? warp_sum(value) : 0.0f;
}
