//! Training: one step is one plan (forward, loss, backward, clipping, optimizer).

pub mod checkpoint;
mod config;
mod fit;
mod optimizer;
mod ranks;
mod report;
mod schedule;
mod step;
mod submit;
mod traced;
mod trainer;

pub use checkpoint::Progress;
pub use config::TrainingConfig;
pub use optimizer::AdamWConfig;
pub use report::Report;
pub use schedule::LRScheduler;
pub use step::{StepCount, StepMetrics, StepShape, TrainStep};
pub use trainer::Trainer;
