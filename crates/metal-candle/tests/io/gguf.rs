use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use metal_candle::io::Error;
use metal_candle::io::gguf::{Encoding, GgufFile, Problem, StoredTensor};
use metal_candle_graph::{BlockFormat, DType as GraphDType};
use proptest::prelude::*;

use super::support::{GgufBuilder, Meta, smollm2};

/// A file of every kind of value, and with tensors of three encodings.
fn small() -> GgufBuilder {
    let halves: Vec<u8> =
        (0..4).flat_map(|i| half::f16::from_f32(i as f32 / 2.0).to_le_bytes()).collect();
    GgufBuilder::default()
        .meta("general.architecture", Meta::Str("llama".into()))
        .meta("a.u32", Meta::U32(7))
        .meta("a.f32", Meta::F32(1.5))
        .meta("a.bool", Meta::Bool(true))
        .meta("a.strings", Meta::Strs(vec!["x".into(), "yy".into()]))
        .meta("a.ints", Meta::I32s(vec![1, 2, 3]))
        .meta("a.u64", Meta::Raw(10, u64::MAX.to_le_bytes().to_vec()))
        .f32_tensor("dense", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .tensor("halves", &[4], 1, &halves)
        .tensor("blocks", &[2, 32], 8, &[3; 68])
}

pub(super) fn open(builder: &GgufBuilder) -> metal_candle::io::Result<GgufFile> {
    let folder = tempfile::tempdir().unwrap();
    GgufFile::open(builder.write(folder.path()))
}

fn problem(builder: &GgufBuilder) -> Problem {
    match open(builder) {
        Err(Error::Gguf { problem, .. }) => problem,
        other => panic!("expected a problem with the file, got {other:?}"),
    }
}

pub(super) fn opened_problem<T: std::fmt::Debug>(result: metal_candle::io::Result<T>) -> Problem {
    match result {
        Err(Error::Gguf { problem, .. }) => problem,
        other => panic!("expected a problem with the file, got {other:?}"),
    }
}

#[test]
fn values_are_read_by_type() {
    let file = open(&small()).unwrap();
    assert_eq!(file.u32("a.u32").unwrap(), 7);
    assert_eq!(file.f64("a.f32").unwrap(), 1.5);
    assert_eq!(file.bool_opt("a.bool").unwrap(), Some(true));
    assert_eq!(file.str("general.architecture").unwrap(), "llama");
    assert_eq!(file.strings("a.strings").unwrap(), ["x", "yy"]);
    assert_eq!(file.u32s("a.ints").unwrap(), [1, 2, 3]);
    assert_eq!(file.u32_opt("absent").unwrap(), None);
    assert!(matches!(opened_problem(file.u32("absent")), Problem::NoKey { .. }));
    for error in [
        opened_problem(file.u32("a.u64")),
        opened_problem(file.u32("a.f32")),
        opened_problem(file.str_opt("a.u32")),
        opened_problem(file.strings("a.ints")),
    ] {
        assert!(matches!(error, Problem::ValueType { .. }), "{error}");
    }
}

#[test]
fn tensors_are_read_by_range() {
    let file = open(&small()).unwrap();
    let names: Vec<_> = file.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["dense", "halves", "blocks"]);
    let dense = file.tensor_bytes("dense").unwrap();
    assert_eq!(dense.shape, [2, 3]);
    assert_eq!(dense.encoding, Encoding::Dense(GraphDType::F32));
    let blocks = file.tensor_bytes("blocks").unwrap();
    assert_eq!(blocks.encoding, Encoding::Blocks(BlockFormat::Q8_0));
    assert_eq!(*blocks.bytes, [3; 68]);
    let values = file.dequantize("dense").unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(values, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    let values = file.dequantize("halves").unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values, [0.0, 0.5, 1.0, 1.5]);
    assert!(matches!(opened_problem(file.tensor_bytes("nope")), Problem::NoTensor { .. }));
}

#[test]
fn every_block_format_is_what_candle_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("candle.gguf");
    let source = Tensor::randn(0f32, 1.0, (3, 256), &Device::Cpu).unwrap();
    let dtypes = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8K,
    ];
    let tensors: Vec<(String, QTensor)> = dtypes
        .iter()
        .map(|&dtype| (format!("{dtype:?}"), QTensor::quantize(&source, dtype).unwrap()))
        .collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut out = std::fs::File::create(&path).unwrap();
    gguf_file::write(&mut out, &[], &named).unwrap();
    let file = GgufFile::open(&path).unwrap();
    for (name, tensor) in &tensors {
        let expected = tensor.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(file.dequantize(name).unwrap().to_vec2::<f32>().unwrap(), expected, "{name}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    let whole = small().bytes();
    for len in 0..whole.len() {
        std::fs::write(&path, &whole[..len]).unwrap();
        let problem = opened_problem(GgufFile::open(&path));
        assert!(
            matches!(problem, Problem::Truncated { .. } | Problem::PastEnd { .. }),
            "cut at {len}: {problem}"
        );
    }
    std::fs::write(&path, &whole).unwrap();
    GgufFile::open(&path).unwrap();
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let huge = |count_at: usize| {
        let mut bytes = small().bytes();
        bytes[count_at..count_at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        bytes
    };
    let raw = |bytes: Vec<u8>| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw.gguf");
        std::fs::write(&path, bytes).unwrap();
        opened_problem(GgufFile::open(path))
    };
    let tensor = |dims: &[u64], type_id: u32, offset: u64| {
        let mut builder = small();
        builder.tensors.push(("bad".into(), dims.to_vec(), type_id, Some(offset)));
        problem(&builder)
    };
    let array = |kind: u32, len: u64| {
        let bytes = [kind.to_le_bytes().to_vec(), len.to_le_bytes().to_vec()].concat();
        problem(&small().meta("bad", Meta::Raw(9, bytes)))
    };
    let alignment = |value| problem(&small().meta("general.alignment", value));
    let string = u64::MAX.to_le_bytes().to_vec();
    let cases = [
        ("magic", raw(b"GGML----".repeat(9)), "not a GGUF file"),
        ("version", raw([b"GGUF".as_slice(), &[1, 0, 0, 0], &[0; 40]].concat()), "version 1"),
        ("endianness", raw([b"GGUF".as_slice(), &[0, 0, 0, 3], &[0; 40]].concat()), "version"),
        ("tensor count", raw(huge(8)), "ends too early"),
        ("key count", raw(huge(16)), "ends too early"),
        ("string length", problem(&small().meta("bad", Meta::Raw(8, string))), "ends too early"),
        ("array length", array(4, u64::MAX), "ends too early"),
        ("array in array", array(9, 1), "array of arrays"),
        ("array of no type", array(77, 1), "unknown value type 77"),
        ("value type", problem(&small().meta("bad", Meta::Raw(13, vec![0; 8]))), "type 13"),
        ("alignment 0", alignment(Meta::U32(0)), "power of two"),
        ("alignment 24", alignment(Meta::U32(24)), "power of two"),
        ("alignment text", alignment(Meta::Str("32".into())), "expected an integer"),
        ("rank", tensor(&[1; 5], 0, 0), "5 dims"),
        ("no rows", tensor(&[32, 0], 0, 0), "no elements"),
        ("overflow", tensor(&[u64::MAX, 2], 0, 0), "larger than can be addressed"),
        ("byte overflow", tensor(&[1 << 62], 0, 0), "larger than can be addressed"),
        ("half a block", tensor(&[33, 2], 8, 0), "whole blocks"),
        ("type", tensor(&[32], 4, 0), "type id 4"),
        ("offset", tensor(&[32], 0, 1 << 40), "ends at offset"),
        ("offset overflow", tensor(&[32], 0, u64::MAX), "ends at offset"),
        ("past the end", tensor(&[1 << 40], 8, 0), "ends at offset"),
    ];
    for (name, problem, expected) in cases {
        assert!(problem.to_string().contains(expected), "{name}: {problem}");
    }
}

#[test]
fn names_that_occur_twice_are_refused() {
    let mut tensors = small();
    tensors.tensors.push(tensors.tensors[0].clone());
    let mut keys = small();
    keys.metadata.push(keys.metadata[0].clone());
    for builder in [tensors, keys] {
        assert!(matches!(problem(&builder), Problem::Duplicate { .. }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// Whatever bytes are changed, opening and reading neither panics nor allocates beyond the file.
    #[test]
    fn a_damaged_file_is_read_or_refused(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        let mut bytes = small().bytes();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged.gguf");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(file) = GgufFile::open(&path) {
            for tensor in file.tensors() {
                let stored = file.tensor_bytes(&tensor.name).unwrap();
                prop_assert!(stored.bytes.len() <= bytes.len());
                stored.dequantize().unwrap();
            }
            let _ = file.decoder_config();
        }
    }
}

#[test]
fn rows_are_put_back_into_the_order_of_hugging_face() {
    // llama.cpp's converter: reshape(heads, 2, d/2, k).swapaxes(1, 2).
    let (heads, half, k) = (2, 3, 4);
    let original: Vec<f32> = (0..heads * 2 * half * k).map(|i| i as f32).collect();
    let original = Tensor::from_vec(original, (heads, 2, half, k), &Device::Cpu).unwrap();
    let permuted = original.transpose(1, 2).unwrap().flatten_all().unwrap();
    let bytes: Vec<u8> =
        permuted.to_vec1::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut stored = StoredTensor {
        encoding: Encoding::Dense(GraphDType::F32),
        shape: vec![heads * 2 * half, k],
        bytes: bytes.into(),
    };
    stored.unpermute_rope_rows(heads).unwrap();
    let rows = stored.dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(rows, original.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    for heads in [0, 4, 5, 12] {
        let error = stored.unpermute_rope_rows(heads).unwrap_err();
        assert!(matches!(error, Problem::Heads { rows: 12, .. }), "{error}");
    }
    stored.bytes = stored.bytes[1..].to_vec().into();
    let error = stored.unpermute_rope_rows(2).unwrap_err();
    assert!(matches!(error, Problem::StoredLength { .. }), "{error}");
}

#[test]
fn quantised_rows_are_put_back_without_a_change_of_value() {
    let source = Tensor::randn(0f32, 1.0, (8, 64), &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&source, GgmlDType::Q4_1).unwrap();
    let mut stored = StoredTensor {
        encoding: Encoding::Blocks(BlockFormat::Q4_1),
        shape: vec![8, 64],
        bytes: quantised.data().unwrap().into_owned().into(),
    };
    let before = stored.dequantize().unwrap();
    stored.unpermute_rope_rows(2).unwrap();
    let order = Tensor::new(&[0u32, 2, 1, 3, 4, 6, 5, 7], &Device::Cpu).unwrap();
    let expected = before.index_select(&order, 0).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(stored.dequantize().unwrap().to_vec2::<f32>().unwrap(), expected);
}

#[test]
fn smollm2_is_read_as_candle_reads_it() {
    let Some(path) = smollm2("smollm2_is_read_as_candle_reads_it") else { return };
    let file = GgufFile::open(&path).unwrap();
    let config = file.decoder_config().unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.num_layers), (49152, 576, 30));
    assert_eq!((config.num_heads, config.num_kv_heads, config.head_dim), (9, 3, 64));
    assert!(config.tie_word_embeddings);
    assert_eq!(file.weight_names().count(), file.tensors().len());
    let mut candle_file = std::fs::File::open(&path).unwrap();
    let content = gguf_file::Content::read(&mut candle_file).unwrap();
    assert_eq!(content.tensor_infos.len(), file.tensors().len());
    for name in ["token_embd.weight", "blk.3.ffn_down.weight", "output_norm.weight"] {
        let expected = content.tensor(&mut candle_file, name, &Device::Cpu).unwrap();
        let expected = expected.dequantize(&Device::Cpu).unwrap();
        let got = file.dequantize(name).unwrap();
        assert_eq!((got.dims(), got.dtype()), (expected.dims(), DType::F32));
        let (got, expected) = (got.flatten_all().unwrap(), expected.flatten_all().unwrap());
        assert!(got.to_vec1::<f32>().unwrap() == expected.to_vec1::<f32>().unwrap(), "{name}");
    }
}
