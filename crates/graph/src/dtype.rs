//! Element types, and the block formats of quantised weights.

use std::fmt;

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    U8,
    U32,
    I64,
    BF16,
    F16,
    F32,
    F64,
}

/// The type in which a kernel computes on a [`DType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// `f32` registers: F32, BF16 and F16 (widened at the load, rounded at the store).
    F32,
    /// `f64` registers: F64.
    F64,
    /// `i64` registers: U8, U32 and I64 (wrapped at the store).
    I64,
}

impl DType {
    /// From the narrowest integer to the widest float.
    pub const ALL: [DType; 7] =
        [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];

    /// The bytes of an element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::BF16 | DType::F16 => 2,
            DType::U32 | DType::F32 => 4,
            DType::I64 | DType::F64 => 8,
        }
    }

    /// What it is computed in.
    pub const fn class(self) -> Class {
        match self {
            DType::U8 | DType::U32 | DType::I64 => Class::I64,
            DType::BF16 | DType::F16 | DType::F32 => Class::F32,
            DType::F64 => Class::F64,
        }
    }

    /// Whether it has fractions, and gradients.
    pub const fn is_float(self) -> bool {
        !matches!(self.class(), Class::I64)
    }

    /// The name that Candle prints: `f32`, `bf16`, ...
    pub const fn as_str(self) -> &'static str {
        match self {
            DType::U8 => "u8",
            DType::U32 => "u32",
            DType::I64 => "i64",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F32 => "f32",
            DType::F64 => "f64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A block format: `block_len` weights in `block_bytes` bytes.
///
/// Layouts are those of ggml's `ggml-common.h`, as Candle reads them, but for NF4, which GGUF files do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
    /// 4-bit NormalFloat (Dettmers et al. 2023), 64 weights in 36 bytes: their largest magnitude as a little-endian f32,
    /// then 32 bytes of two codes each, the earlier one in the high bits, as bitsandbytes has them. A weight is that
    /// magnitude times the code's entry in [`BlockFormat::NF4_VALUES`], rounded to f32.
    NF4,
}

impl BlockFormat {
    pub const ALL: [BlockFormat; 13] = [
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q5_0,
        BlockFormat::Q5_1,
        BlockFormat::Q8_0,
        BlockFormat::Q8_1,
        BlockFormat::Q2K,
        BlockFormat::Q3K,
        BlockFormat::Q4K,
        BlockFormat::Q5K,
        BlockFormat::Q6K,
        BlockFormat::Q8K,
        BlockFormat::NF4,
    ];

    /// What the codes of NF4 stand for: quantiles of the normal distribution, from -1 to 1 (appendix E of the paper).
    pub const NF4_VALUES: [f32; 16] = [
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ];

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        match self {
            BlockFormat::Q4_0
            | BlockFormat::Q4_1
            | BlockFormat::Q5_0
            | BlockFormat::Q5_1
            | BlockFormat::Q8_0
            | BlockFormat::Q8_1 => 32,
            BlockFormat::NF4 => 64,
            BlockFormat::Q2K
            | BlockFormat::Q3K
            | BlockFormat::Q4K
            | BlockFormat::Q5K
            | BlockFormat::Q6K
            | BlockFormat::Q8K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            BlockFormat::Q4_0 => 18,
            BlockFormat::Q4_1 => 20,
            BlockFormat::Q5_0 => 22,
            BlockFormat::Q5_1 => 24,
            BlockFormat::Q8_0 => 34,
            BlockFormat::Q8_1 => 36,
            BlockFormat::Q2K => 84,
            BlockFormat::Q3K => 110,
            BlockFormat::Q4K => 144,
            BlockFormat::Q5K => 176,
            BlockFormat::Q6K => 210,
            BlockFormat::Q8K => 292,
            BlockFormat::NF4 => 36,
        }
    }

    /// Bytes of `len` weights, or `None` where `len` is no multiple of the block.
    pub const fn bytes_for(self, len: usize) -> Option<usize> {
        if len.is_multiple_of(self.block_len()) {
            (len / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}
