//! The keys and values of the tokens seen so far.

use crate::error::ErrorKind;
use crate::models::Decoder;
use crate::{DType, Device, LazyTensor, Result};
use half::{bf16, f16};

/// Preallocated keys and values, `[batch, capacity, kv heads, head dim]` for every layer. They are
/// donated to each step and updated in place.
#[derive(Debug)]
pub struct KVCache {
    pub(super) keys: Vec<LazyTensor>,
    pub(super) values: Vec<LazyTensor>,
    capacity: usize,
    len: usize,
    device: Device,
}

impl KVCache {
    /// An empty cache for `capacity` positions, where the decoder is and of [its dtype](Decoder::cache).
    ///
    /// # Errors
    /// Where that many positions cannot be addressed.
    pub fn new(decoder: &Decoder, batch: usize, capacity: usize) -> Result<Self> {
        let (config, device) = (&decoder.config, decoder.device());
        let dims = [batch, capacity, config.num_kv_heads, config.head_dim];
        let len = dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        let len = len.filter(|n| *n <= isize::MAX as usize / 4);
        let len = len.ok_or_else(|| ErrorKind::CacheSize { dims: dims.to_vec() })?;
        // Zeroed pages of the machine's, in memory that nothing else holds: no run is waited for.
        let layer = || match decoder.cache() {
            DType::BF16 => LazyTensor::from_vec(vec![bf16::ZERO; len], &dims, device),
            DType::F16 => LazyTensor::from_vec(vec![f16::ZERO; len], &dims, device),
            _ => LazyTensor::from_vec(vec![0f32; len], &dims, device),
        };
        let layers = || (0..config.num_layers).map(|_| layer()).collect::<Result<Vec<_>>>();
        Ok(KVCache { keys: layers()?, values: layers()?, capacity, len: 0, device: *device })
    }

    /// Positions that hold a token.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token was seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions in all.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Where it is; while a step runs, keys and values are with the step.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn has_room(&self) -> bool {
        self.len < self.capacity
    }

    /// Forgets what comes after `len` positions.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// More positions after those that there are.
    pub(super) fn grow(&mut self, capacity: usize) -> Result<()> {
        for tensor in self.keys.iter_mut().chain(&mut self.values) {
            *tensor = tensor.pad(1, 0, capacity - self.capacity, 0.0)?.into_owned()?;
        }
        self.capacity = capacity;
        Ok(())
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
