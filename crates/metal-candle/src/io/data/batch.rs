//! Sequences to padded batches, in an order that is a function of the seed alone.

mod pack;
mod widths;

use metal_candle_graph::philox4x32;
use serde::{Deserialize, Serialize};

use super::{Example, Problem};

/// What cross-entropy is told to ignore.
const IGNORE: i64 = -100;

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
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Where the documents of each row lie; `None` where a row is one document.
    pub documents: Option<Documents>,
}

/// Where the documents of packed rows lie.
#[derive(Clone, Debug, PartialEq)]
pub struct Documents {
    /// `[batch, seq]`: the document of its row that a token belongs to, from 1; 0 where padded.
    pub segments: Vec<u32>,
    /// `[batch, seq]`: where in its document a token stands, from 0.
    pub positions: Vec<u32>,
}

impl Batch {
    /// A batch of padding.
    fn blank(batch: usize, seq: usize, packed: bool) -> Batch {
        let zeros = || vec![0; batch * seq];
        let documents = packed.then(|| Documents { segments: zeros(), positions: zeros() });
        Batch { ids: zeros(), labels: vec![IGNORE; batch * seq], batch, seq, trained: 0, documents }
    }
}

impl Batch {
    /// Every `step`-th row, from row `first` on: rows of like length are shared evenly.
    pub(crate) fn every(&self, step: usize, first: usize) -> Batch {
        fn pick<T: Copy>(all: &[T], seq: usize, step: usize, first: usize) -> Vec<T> {
            all.chunks(seq).skip(first).step_by(step).flatten().copied().collect()
        }
        let ids = |all: &[u32]| pick(all, self.seq, step, first);
        let labels = pick(&self.labels, self.seq, step, first);
        let documents = self.documents.as_ref().map(|documents| Documents {
            segments: ids(&documents.segments),
            positions: ids(&documents.positions),
        });
        Batch {
            ids: ids(&self.ids),
            batch: (self.batch - first).div_ceil(step),
            seq: self.seq,
            trained: labels.iter().filter(|&&label| label != IGNORE).count(),
            labels,
            documents,
        }
    }
}

/// How full the batches of an epoch are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Places in all batches together.
    pub places: usize,
    /// Places that hold a token.
    pub tokens: usize,
}

impl Occupancy {
    /// The part of the places that is padding.
    pub fn padding(&self) -> f64 {
        1.0 - self.tokens as f64 / self.places.max(1) as f64
    }
}

/// The examples that share a row: one, or several where they are packed.
type Row = Vec<usize>;

/// Makes batches without end.
#[derive(Clone, Debug)]
pub struct Batcher {
    examples: Vec<Example>,
    options: BatchOptions,
    packed: bool,
    cursor: Cursor,
    /// What batches are padded to, ascending. The same in every epoch: orders differ, and what the
    /// batches need does not.
    widths: Vec<usize>,
    /// This epoch's batches.
    plan: Vec<Vec<Row>>,
}

impl Batcher {
    /// A batcher at the start of the first epoch: every example has a row of its own.
    ///
    /// # Errors
    /// [`Problem::Empty`], [`Problem::Zero`]; [`Problem::Mask`] for an example whose mask has
    /// another length than its ids.
    pub fn new(examples: Vec<Example>, options: BatchOptions) -> Result<Self, Problem> {
        Batcher::start(examples, options, false)
    }

    /// A batcher that packs as many examples into each row of `max_seq_length` as fit. They stay
    /// apart: each is a document of its own to attention and in its positions, and no label
    /// reaches over a border ([`Batch::documents`]).
    ///
    /// # Errors
    /// As [`Batcher::new`].
    pub fn packed(examples: Vec<Example>, options: BatchOptions) -> Result<Self, Problem> {
        Batcher::start(examples, options, true)
    }

    fn start(examples: Vec<Example>, options: BatchOptions, packed: bool) -> Result<Self, Problem> {
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
        let (cursor, widths, plan) = (Cursor::default(), Vec::new(), Vec::new());
        let mut batcher = Self { examples, options, packed, cursor, widths, plan };
        batcher.plan = batcher.plan_epoch(0);
        batcher.widths =
            widths::choose(batcher.plan.iter().map(|rows| batcher.needed(rows)).collect());
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
        self.plan.len()
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

    /// The shapes `(batch, seq)` that occur, each once, the largest first.
    pub fn shapes(&self) -> Vec<(usize, usize)> {
        self.widths.iter().rev().map(|seq| (self.options.batch_size, *seq)).collect()
    }

    /// How full an epoch's batches are.
    pub fn occupancy(&self) -> Occupancy {
        let width = |rows: &Vec<Row>| self.options.batch_size * self.width(rows);
        Occupancy {
            places: self.plan.iter().map(width).sum(),
            tokens: (0..self.examples.len()).map(|i| self.inputs(i)).sum(),
        }
    }

    fn plan_epoch(&self, epoch: u64) -> Vec<Vec<Row>> {
        let mut order: Vec<usize> = (0..self.examples.len()).collect();
        if let Order::Shuffled { seed } = self.options.order {
            shuffle(&mut order, seed, epoch, 0);
        }
        let mut rows: Vec<Row> = match self.packed {
            true => {
                let documents = order.into_iter().map(|i| (i, self.inputs(i))).collect();
                pack::best_fit(documents, self.options.max_seq_length)
            }
            false => order.into_iter().map(|i| vec![i]).collect(),
        };
        let chunk = |rows: &[Row]| -> Vec<Vec<Row>> {
            rows.chunks(self.options.batch_size).map(<[Row]>::to_vec).collect()
        };
        match self.options.order {
            Order::File => chunk(&rows),
            Order::Shuffled { seed } => {
                // The sort is stable: rows of one padded length stay shuffled.
                rows.sort_by_key(|row| self.rounded(row));
                let mut batches = chunk(&rows);
                shuffle(&mut batches, seed, epoch, 1);
                batches
            }
        }
    }

    /// Columns that an example needs: its last token is only ever a label.
    fn inputs(&self, example: usize) -> usize {
        let len = self.examples[example].ids.len();
        len.saturating_sub(1).clamp(1, self.options.max_seq_length)
    }

    fn rounded(&self, row: &Row) -> usize {
        let inputs = row.iter().map(|&i| self.inputs(i)).sum();
        widths::rounded(inputs, self.options.max_seq_length)
    }

    /// Columns that a batch needs.
    fn needed(&self, rows: &[Row]) -> usize {
        rows.iter().map(|row| self.rounded(row)).max().unwrap_or(0)
    }

    /// Columns that a batch gets.
    fn width(&self, rows: &[Row]) -> usize {
        let needed = self.needed(rows);
        let width = self.widths.iter().find(|width| **width >= needed);
        *width.expect("metal-candle bug: a batch wider than every width")
    }

    fn assemble(&self, rows: &[Row]) -> Batch {
        let seq = self.width(rows);
        let mut batch = Batch::blank(self.options.batch_size, seq, self.packed);
        for (i, row) in rows.iter().enumerate() {
            let mut at = i * seq;
            for (document, &example) in (1..).zip(row) {
                self.place(&mut batch, at, document, example);
                at += self.inputs(example);
            }
        }
        batch.trained = batch.labels.iter().filter(|&&label| label != IGNORE).count();
        batch
    }

    /// Writes an example to `at` as this document of its row.
    fn place(&self, batch: &mut Batch, at: usize, document: u32, example: usize) {
        let Example { ids, trained } = &self.examples[example];
        let inputs = self.inputs(example);
        // Where nothing follows, the last token may stand: no label looks at it.
        let shown = if self.packed { inputs } else { ids.len().min(batch.seq) };
        batch.ids[at..at + shown].copy_from_slice(&ids[..shown]);
        let next = ids.iter().zip(trained).skip(1);
        for (label, (&id, &trained)) in batch.labels[at..at + inputs].iter_mut().zip(next) {
            if trained {
                *label = id.into();
            }
        }
        if let Some(documents) = &mut batch.documents {
            documents.segments[at..at + inputs].fill(document);
            for (position, slot) in (0..).zip(&mut documents.positions[at..at + inputs]) {
                *slot = position;
            }
        }
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
