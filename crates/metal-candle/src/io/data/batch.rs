//! Sequences to padded batches, in an order that is a function of the seed alone.

use metal_candle_graph::philox4x32;
use serde::{Deserialize, Serialize};

use super::{Example, Problem};

/// What cross-entropy is told to ignore.
const IGNORE: i64 = -100;
/// Batches are padded to a multiple of it, so that few shapes, and so few plans, occur.
const PAD_MULTIPLE: usize = 32;

/// In which order the examples come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Another one each epoch: examples of like length together, batches in random order.
    Shuffled {
        /// The order is a function of it and of the epoch.
        seed: u64,
    },
    /// As they are, the same each epoch.
    File,
}

/// How examples become batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Rows of every batch.
    pub batch_size: usize,
    /// The longest `seq`; also the cut for longer examples.
    pub max_seq_length: usize,
    /// In which order the examples come.
    pub order: Order,
}

/// Where a run stands in its data: the next batch. What a checkpoint keeps of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Batches of this epoch that are done.
    pub batch: usize,
}

/// A padded batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[batch, seq]`; 0 where padded.
    pub ids: Vec<u32>,
    /// `[batch, seq]`: the id to predict at each position, -100 where nothing is trained.
    pub labels: Vec<i64>,
    /// Rows. The last batch of an epoch is filled up with rows of padding.
    pub batch: usize,
    /// Columns.
    pub seq: usize,
    /// Labels that are not -100.
    pub trained: usize,
}

/// Makes batches without end.
#[derive(Clone, Debug)]
pub struct Batcher {
    examples: Vec<Example>,
    options: BatchOptions,
    cursor: Cursor,
    /// This epoch's batches, as indices into `examples`.
    plan: Vec<Vec<usize>>,
}

impl Batcher {
    /// A batcher at the start of the first epoch.
    ///
    /// # Errors
    /// [`Problem::Empty`], [`Problem::Zero`]; [`Problem::Mask`] for an example whose mask has
    /// another length than its ids.
    pub fn new(examples: Vec<Example>, options: BatchOptions) -> Result<Self, Problem> {
        if examples.is_empty() {
            return Err(Problem::Empty);
        }
        let sizes =
            [("batch_size", options.batch_size), ("max_seq_length", options.max_seq_length)];
        if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Problem::Zero { what });
        }
        if let Some(e) = examples.iter().find(|e| e.ids.len() != e.trained.len()) {
            return Err(Problem::Mask { ids: e.ids.len(), trained: e.trained.len() });
        }
        let mut batcher = Self { examples, options, cursor: Cursor::default(), plan: Vec::new() };
        batcher.plan = batcher.plan_epoch(0);
        Ok(batcher)
    }

    /// The next batch; after the last one of an epoch the next epoch begins.
    pub fn next_batch(&mut self) -> Batch {
        let batch = self.assemble(&self.plan[self.cursor.batch]);
        let next = match self.cursor {
            Cursor { epoch, batch } if batch + 1 == self.plan.len() => {
                Cursor { epoch: epoch + 1, batch: 0 }
            }
            Cursor { epoch, batch } => Cursor { epoch, batch: batch + 1 },
        };
        self.seek(next);
        batch
    }

    /// Batches of every epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.examples.len().div_ceil(self.options.batch_size)
    }

    /// Where the next batch stands.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes where another batcher over the same examples with the same options stood: the batches
    /// from there on are the same. A cursor past its epoch's end goes to the next epoch.
    pub fn seek(&mut self, cursor: Cursor) {
        let past = cursor.batch >= self.batches_per_epoch();
        let cursor = if past { Cursor { epoch: cursor.epoch + 1, batch: 0 } } else { cursor };
        if cursor.epoch != self.cursor.epoch {
            self.plan = self.plan_epoch(cursor.epoch);
        }
        self.cursor = cursor;
    }

    /// The shapes `(batch, seq)` that occur in this epoch, each once, the largest first.
    pub fn shapes(&self) -> Vec<(usize, usize)> {
        let mut lengths: Vec<usize> = self.plan.iter().map(|rows| self.seq(rows)).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        lengths.into_iter().map(|seq| (self.options.batch_size, seq)).collect()
    }

    fn plan_epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.examples.len()).collect();
        let chunk = |order: &[usize]| -> Vec<Vec<usize>> {
            order.chunks(self.options.batch_size).map(<[usize]>::to_vec).collect()
        };
        match self.options.order {
            Order::File => chunk(&order),
            Order::Shuffled { seed } => {
                shuffle(&mut order, seed, epoch, 0);
                // The sort is stable: examples of one padded length stay shuffled.
                order.sort_by_key(|&i| self.padded(&self.examples[i]));
                let mut batches = chunk(&order);
                shuffle(&mut batches, seed, epoch, 1);
                batches
            }
        }
    }

    fn seq(&self, rows: &[usize]) -> usize {
        rows.iter().map(|&i| self.padded(&self.examples[i])).max().unwrap_or(0)
    }

    /// Columns that an example needs: its last token is only ever a label.
    fn padded(&self, example: &Example) -> usize {
        let inputs = example.ids.len().saturating_sub(1).max(1);
        inputs.next_multiple_of(PAD_MULTIPLE).min(self.options.max_seq_length)
    }

    fn assemble(&self, rows: &[usize]) -> Batch {
        let (batch, seq) = (self.options.batch_size, self.seq(rows));
        let mut ids = vec![0; batch * seq];
        let mut labels = vec![IGNORE; batch * seq];
        for (&row, (ids, labels)) in
            rows.iter().zip(ids.chunks_exact_mut(seq).zip(labels.chunks_exact_mut(seq)))
        {
            let example = &self.examples[row];
            let len = example.ids.len().min(seq);
            ids[..len].copy_from_slice(&example.ids[..len]);
            let next = example.ids.iter().zip(&example.trained).skip(1);
            for (label, (&id, &trained)) in labels.iter_mut().zip(next) {
                if trained {
                    *label = id.into();
                }
            }
        }
        let trained = labels.iter().filter(|&&label| label != IGNORE).count();
        Batch { ids, labels, batch, seq, trained }
    }
}

/// Fisher and Yates, by the numbers that belong to (seed, epoch, stream).
fn shuffle<T>(items: &mut [T], seed: u64, epoch: u64, stream: u32) {
    let key = [seed as u32, (seed >> 32) as u32];
    for i in (1..items.len()).rev() {
        let counter = [i as u32, epoch as u32, (epoch >> 32) as u32, stream];
        let [low, high, ..] = philox4x32(counter, key);
        let random = u64::from(high) << 32 | u64::from(low);
        // The high half of the product is uniform in 0..=i, but for a bias of i / 2^64.
        let j = (u128::from(random) * (i as u128 + 1)) >> 64;
        items.swap(i, j as usize);
    }
}
