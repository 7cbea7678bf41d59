//! What is kept from one turn of a conversation to the next.

use super::KVCache;
use crate::Result;
use crate::models::Decoder;
use std::sync::{Arc, Weak};

/// The keys and values of a conversation so far, for [`Generator::generate_in`]. With another
/// generator, or another adapter on it, everything is computed anew.
///
/// Nothing need be told to it when the conversation is edited: each prompt is compared with what is
/// cached, token by token, and what differs is computed anew.
///
/// [`Generator::generate_in`]: super::Generator::generate_in
#[derive(Debug, Default)]
pub struct Session {
    /// The tokens that the cache holds.
    ids: Vec<u32>,
    cache: Option<KVCache>,
    /// Whose keys and values these are; a generator that changes its adapter has another one.
    decoder: Weak<Decoder>,
}

impl Session {
    /// Tokens whose keys and values are kept.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The cache, with that beginning of `ids` in it that it already held; at least the last id is
    /// left to be computed, because its logits are wanted.
    pub(super) fn take(
        &mut self,
        decoder: &Arc<Decoder>,
        ids: &[u32],
        capacity: usize,
    ) -> Result<KVCache> {
        let config = &decoder.config;
        let held = std::mem::take(&mut self.ids);
        let is_same = std::ptr::eq(self.decoder.as_ptr(), Arc::as_ptr(decoder));
        let Some(mut cache) = self.cache.take().filter(|_| is_same) else {
            return KVCache::new(decoder, 1, capacity);
        };
        let common = held.iter().zip(ids).take_while(|(a, b)| a == b).count();
        cache.truncate(common.min(ids.len() - 1));
        if cache.capacity() < capacity {
            // Twice as much, so that a long conversation moves seldom.
            let most = config.max_position_embeddings;
            cache.grow(capacity.max(2 * cache.capacity()).min(most))?;
        }
        Ok(cache)
    }

    /// Keeps the cache of these tokens; the last of them may not be in it.
    pub(super) fn keep(&mut self, decoder: &Arc<Decoder>, ids: &[u32], cache: KVCache) {
        self.decoder = Arc::downgrade(decoder);
        self.ids = ids[..cache.len().min(ids.len())].to_vec();
        self.cache = Some(cache);
    }
}
