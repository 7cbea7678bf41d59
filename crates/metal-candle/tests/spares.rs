//! The memory of large results that were dropped is used again, and nobody sees it.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use metal_candle::{Compiled, LazyTensor, compile};
use std::sync::{Arc, Barrier};
use std::thread;
use testbed::device;

/// Elements of a large result, of 4 MiB and a little more, and its bytes.
const LEN: usize = (1 << 20) + 64;
const BYTES: usize = 4 * LEN;

/// Why these are laws of the CPU.
const SPARES: &str = "the memory of a GPU's results comes from a pool";

/// `x + 1`
fn successor() -> Compiled {
    compile(|x: &[LazyTensor]| Ok(vec![x[0].affine(1.0, 1.0)?]))
}

fn full(value: f32) -> LazyTensor {
    LazyTensor::from_vec(vec![value; LEN], &[LEN], device()).unwrap()
}

fn call(f: &Compiled, x: &LazyTensor) -> LazyTensor {
    f.call(vec![x.clone()]).unwrap().remove(0)
}

#[track_caller]
fn assert_all(x: &LazyTensor, value: f32) {
    let values = x.to_vec::<f32>().unwrap();
    assert!(values.len() == LEN && values.iter().all(|v| *v == value), "expected {value}");
}

#[test]
fn a_result_that_is_held_stays_as_it_is() {
    let f = successor();
    let held: Vec<LazyTensor> = (0..4).map(|i| call(&f, &full(i as f32))).collect();
    let clone = held[2].clone();
    for (i, held) in held.into_iter().enumerate() {
        assert_all(&held, i as f32 + 1.0);
        drop(held);
        assert_all(&call(&f, &full(-5.0)), -4.0);
    }
    // One handle of the third is left: it is none of those that were written over.
    assert_all(&clone, 3.0);
}

#[test]
fn at_most_one_spare_is_kept_for_each_result() {
    if !testbed::is_on_cpu("at_most_one_spare_is_kept_for_each_result", SPARES) {
        return;
    }
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].affine(1.0, 1.0)?, x[0].sum_all()?]));
    let x = full(1.0);
    assert_eq!(f.spare_bytes(), 0);
    let results: Vec<_> = (0..3).map(|_| f.call(vec![x.clone()]).unwrap()).collect();
    assert_eq!(f.spare_bytes(), 0, "they are held");
    drop(results);
    assert_eq!(f.spare_bytes(), BYTES, "the small result is none of them");
    let result = f.call(vec![x]).unwrap();
    assert_eq!(f.spare_bytes(), 0, "in use");
    drop(result);
    assert_eq!(f.spare_bytes(), BYTES);
}

#[test]
fn what_candle_or_another_call_has_taken_over_is_no_spare() {
    if !testbed::is_on_cpu("what_candle_or_another_call_has_taken_over_is_no_spare", SPARES) {
        return;
    }
    let (f, x) = (successor(), full(1.0));
    let tensor = call(&f, &x).eval().unwrap();
    drop(tensor);
    assert_eq!(f.spare_bytes(), 0, "Candle's");

    let update = successor().donate([0]);
    let updated = update.call(vec![call(&f, &x)]).unwrap().remove(0);
    assert_all(&updated, 3.0);
    drop(updated);
    assert_eq!((f.spare_bytes(), update.spare_bytes()), (0, 0), "donated");
}

#[test]
fn threads_that_call_at_once_have_results_of_their_own() {
    let f = Arc::new(successor());
    let start = Arc::new(Barrier::new(4));
    let threads: Vec<_> = (0..4)
        .map(|i| {
            let (f, start) = (Arc::clone(&f), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                let mut last = call(&f, &full(i as f32));
                for round in 1..20 {
                    let x = full((100 * i + round) as f32);
                    let next = call(&f, &x);
                    assert_all(
                        &last,
                        if round == 1 { i as f32 + 1.0 } else { (100 * i + round) as f32 },
                    );
                    last = next;
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(f.spare_bytes() <= BYTES);
}

#[test]
fn threads_whose_first_calls_meet_share_one_memory() {
    if !testbed::is_on_cpu("threads_whose_first_calls_meet_share_one_memory", SPARES) {
        return;
    }
    // Each of them traces the function, and only then both go on.
    let both = Barrier::new(2);
    let f = compile(move |x: &[LazyTensor]| {
        both.wait();
        Ok(vec![x[0].affine(1.0, 1.0)?])
    });
    let f = &f;
    let results: Vec<LazyTensor> = thread::scope(|scope| {
        let threads = [1.0, 2.0].map(|value| scope.spawn(move || call(f, &full(value))));
        threads.map(|thread| thread.join().unwrap()).into()
    });
    drop(results);
    assert_eq!(f.spare_bytes(), BYTES);
}

#[test]
fn a_plan_that_is_evaluated_keeps_no_spare() {
    let x = full(1.0);
    let y = x.affine(3.0, 1.0).unwrap();
    let executable = LazyTensor::cached_plan(&[&y]).unwrap();
    assert_all(&y, 4.0);
    drop(y);
    assert_eq!(executable.spare_bytes(), 0);
}
