//! What the feature `async-exec` adds.
#![cfg(feature = "async-exec")]

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use metal_candle::{DType, LazyTensor};
use std::time::Duration;

fn product(n: usize) -> LazyTensor {
    let x = LazyTensor::randn(&[n, n], DType::F32, 0, device()).unwrap();
    x.matmul(&x).unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn a_spawned_evaluation_gives_the_bits_of_a_blocking_one() {
    let expected = product(64).to_vec::<f32>().unwrap();
    let tasks: Vec<_> = (0..4).map(|_| product(64).spawn_eval()).collect();
    for task in tasks {
        let tensor = task.await.unwrap().unwrap();
        assert_eq!(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_evaluation_within_its_time_has_a_value_and_one_beyond_it_is_given_up() {
    let y = product(32).eval_timeout(Duration::from_secs(60)).await.unwrap().unwrap();
    assert_eq!(y.dims(), [32, 32]);
    // Seconds of work in a millisecond; the thread is free again at once.
    let long = (0..200).fold(product(512), |x, _| x.matmul(&x).unwrap().tanh().unwrap());
    assert!(long.eval_timeout(Duration::from_millis(1)).await.is_err());
}

#[tokio::test(flavor = "current_thread")]
async fn an_error_of_a_task_names_the_line_that_spawned_it() {
    let table = LazyTensor::zeros(&[4, 2], DType::F32, device()).unwrap();
    let ids = LazyTensor::from_slice(&[9u32], &[1], device()).unwrap();
    let error = table.embedding(&ids).unwrap().spawn_eval().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("async_exec.rs"), "{error}");
}
