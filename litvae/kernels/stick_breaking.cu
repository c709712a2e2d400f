// Written by `make export` from nbs/kernels/05_stick_breaking.ipynb; edit that.

// pixels: of one image; count: of the whole batch. Slot k of pixel p of image b lies at (b * slots + k) * pixels + p.
__global__ void stick_breaking(const float* __restrict__ logits, float* __restrict__ log_masks,
                               int slots, int pixels, int count) {
    int i = thread_index();
    if (i >= count) return;
    size_t at = (size_t)(i / pixels) * slots * pixels + i % pixels;
    float scope = 0.0f;
    for (int k = 0; k < slots - 1; ++k, at += pixels) {
        float a = logits[at];
        float t = log1pf(expf(-fabsf(a)));
        log_masks[at] = scope + fminf(a, 0.0f) - t;
        scope += fminf(-a, 0.0f) - t;
    }
    log_masks[at] = scope;
}

__global__ void stick_breaking_backward(const float* __restrict__ grad, const float* __restrict__ logits,
                                        float* __restrict__ out, int slots, int pixels, int count) {
    int i = thread_index();
    if (i >= count) return;
    size_t at = ((size_t)(i / pixels) * slots + slots - 1) * pixels + i % pixels;
    float later = grad[at];
    out[at] = 0.0f;
    for (int k = slots - 2; k >= 0; --k) {
        at -= pixels;
        float share = 1.0f / (1.0f + expf(-logits[at]));
        out[at] = (1.0f - share) * grad[at] - share * later;
        later += grad[at];
    }
}
