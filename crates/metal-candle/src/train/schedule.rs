//! How the learning rate moves over the steps.

/// A learning-rate schedule. Steps count from 0; the rate is that of the step's own update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LRScheduler {
    /// Always the same.
    Constant {
        /// The rate.
        rate: f64,
    },
    /// Up from 0 in a straight line over `warmup` steps, then constant.
    Warmup {
        /// The rate after the warm-up.
        rate: f64,
        /// Steps until then.
        warmup: usize,
    },
    /// Linear warm-up, then half a cosine down to `floor` (Loshchilov & Hutter 2017).
    WarmupCosine {
        /// The rate after the warm-up.
        rate: f64,
        /// Steps until then.
        warmup: usize,
        /// Steps in all, warm-up included.
        total: usize,
        /// The rate at the end.
        floor: f64,
    },
    /// Linear warm-up, then a straight line down to 0.
    WarmupLinear {
        /// The rate after the warm-up.
        rate: f64,
        /// Steps until then.
        warmup: usize,
        /// Steps in all, warm-up included.
        total: usize,
    },
}

impl LRScheduler {
    /// The rate of update number `step`.
    pub fn rate(&self, step: usize) -> f64 {
        match *self {
            LRScheduler::Constant { rate } => rate,
            LRScheduler::Warmup { rate, warmup } => rate * warm(step, warmup),
            LRScheduler::WarmupCosine { rate, warmup, total, floor } => {
                let cosine =
                    (1.0 + (std::f64::consts::PI * progress(step, warmup, total)).cos()) / 2.0;
                match step < warmup {
                    true => rate * warm(step, warmup),
                    false => floor + (rate - floor) * cosine,
                }
            }
            LRScheduler::WarmupLinear { rate, warmup, total } => {
                rate * warm(step, warmup) * (1.0 - progress(step, warmup, total))
            }
        }
    }
}

/// The part of the warm-up that is done, counting the step itself: never 0, or the first step would be lost.
fn warm(step: usize, warmup: usize) -> f64 {
    if step >= warmup { 1.0 } else { (step + 1) as f64 / (warmup + 1) as f64 }
}

/// 0 at the end of the warm-up, 1 at the last step.
fn progress(step: usize, warmup: usize, total: usize) -> f64 {
    let steps = total.saturating_sub(warmup).max(1) as f64;
    (step.saturating_sub(warmup) as f64 / steps).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::LRScheduler;

    #[test]
    fn warmup_rises_to_the_rate_and_cosine_falls_to_the_floor() {
        let s = LRScheduler::WarmupCosine { rate: 1.0, warmup: 4, total: 104, floor: 0.1 };
        let rates: Vec<f64> = (0..=104).map(|i| s.rate(i)).collect();
        assert!(rates[0] > 0.0 && rates[..5].windows(2).all(|w| w[0] < w[1]));
        assert_eq!(rates[4], 1.0);
        assert!(rates[4..].windows(2).all(|w| w[0] > w[1]));
        assert!((rates[54] - 0.55).abs() < 1e-12 && (rates[104] - 0.1).abs() < 1e-12);
    }

    #[test]
    fn linear_ends_at_zero_and_constant_stays() {
        let s = LRScheduler::WarmupLinear { rate: 2.0, warmup: 0, total: 10 };
        assert_eq!((s.rate(0), s.rate(5), s.rate(10), s.rate(99)), (2.0, 1.0, 0.0, 0.0));
        assert_eq!(LRScheduler::Constant { rate: 3.0 }.rate(1 << 40), 3.0);
    }
}
