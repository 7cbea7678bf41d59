//! What a GPU does of the work that peers are timed at, and what of it is the device's own ceiling.
//!
//! ```text
//! cargo bench -p metal-candle --features cuda --bench gpu [-- [--device cuda:0] [--steps] FILTER..]
//! ```
//!
//! One JSON line for each row. Everything is made on the device, so that the program runs where there is no source
//! tree. `--steps` prints the seconds of each kind of step beside a row.

#[path = "gpu/model.rs"]
mod model;
#[path = "gpu/ops.rs"]
mod ops;

use metal_candle::Device;
use std::error::Error;

/// Why a row cannot be measured.
type Failure = Box<dyn Error>;

/// What every row is asked.
struct Context {
    device: Device,
    filters: Vec<String>,
    steps: bool,
}

impl Context {
    fn wants(&self, row: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| row.contains(filter))
    }
}

fn main() -> Result<(), Failure> {
    let mut context = Context { device: Device::best(), filters: Vec::new(), steps: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // Cargo adds it.
            "--bench" => {}
            "--steps" => context.steps = true,
            "--device" => {
                let name = args.next().ok_or("--device: expected cuda:0 or the like")?;
                context.device = Device::parse(&name)?;
            }
            filter => context.filters.push(filter.to_owned()),
        }
    }
    println!(r#"{{"device": "{}"}}"#, context.device.describe()?);
    let ceilings = ops::Ceilings::measure(&context)?;
    ops::rows(&context, &ceilings)?;
    model::rows(&context, &ceilings)
}

/// The median.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}
