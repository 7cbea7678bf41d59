// Any product: 16 x 16 results a block, any strides. For what the library does not take.
extern "C" __global__ void __launch_bounds__(256) NAME(const TYPE* a, const TYPE* b, OUT* out) {
    after_predecessor();
    __shared__ SUM a_tile[16][17], b_tile[16][17];
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const long long down = (M + 15) / 16, across = (N + 15) / 16, tiles = BATCH * down * across;
    for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const long long row = tile / across % down * 16 + y, col = tile % across * 16 + x;
        const long long batch = tile / (across * down);
        const TYPE* a_at = a + (A_START);
        const TYPE* b_at = b + (B_START);
        SUM sum = 0;
        for (long long at = 0; at < K; at += 16) {
            a_tile[y][x] = row < M && at + x < K ? SUM(a_at[row * (A_ROW) + (at + x) * (A_COL)]) : SUM(0);
            b_tile[y][x] = at + y < K && col < N ? SUM(b_at[(at + y) * (B_ROW) + col * (B_COL)]) : SUM(0);
            __syncthreads();
            for (int i = 0; i < 16; ++i) sum += a_tile[y][i] * b_tile[i][x];
            __syncthreads();
        }
        if (row < M && col < N) {
            OUT* to = out + (OUT_START) + row * (OUT_ROW) + col * (OUT_COL);
            *to = OUT(SUM(ALPHA) * sum + (ACCUMULATE ? SUM(*to) : SUM(0)));
        }
    }
}
