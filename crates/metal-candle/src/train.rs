//! Training: one step is one plan (forward, loss, backward, clipping, optimizer).

mod optimizer;
mod schedule;
mod step;
mod trainer;

pub use optimizer::AdamWConfig;
pub use schedule::LRScheduler;
pub use step::{StepMetrics, TrainStep};
pub use trainer::{Report, Trainer, TrainingConfig};
