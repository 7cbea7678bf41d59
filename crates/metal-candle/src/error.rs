//! What went wrong, and at which line of the caller.

use crate::{DType, Device, io};
use metal_candle_compiler::Bytes;
use metal_candle_graph::{Shape, TensorType};
use std::fmt;
use std::panic::Location;
use std::path::PathBuf;

/// An error: its kind, and the line that made the mistake. The message has the line where it is for the caller's code to
/// be mended, not a file, a setting or a text.
pub struct Error {
    kind: Box<ErrorKind>,
    location: &'static Location<'static>,
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of [`Error`]. Each carries the values that made it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ErrorKind {
    /// An ill-formed operation: shapes, dtypes, dims, or a gradient that does not exist.
    #[error(transparent)]
    Graph(#[from] metal_candle_graph::Error),
    /// A failed run: an index out of range, no memory, a donated tensor that others hold.
    #[error(transparent)]
    Runtime(#[from] metal_candle_runtime::Error),
    /// A file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A Candle tensor that could not be read or made.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    #[error(
        "{op}: expected tensors of one device, got one on {lhs} and one on {rhs}: move one with to_device"
    )]
    DeviceMismatch { op: &'static str, lhs: Device, rhs: Device },
    #[error("expected a value of {expected} elements of {dtype} for shape {shape}, got {got}")]
    DataLength { dtype: DType, shape: Shape, expected: usize, got: usize },
    #[error("expected a tensor of one element, got {got}")]
    NotAScalar { got: TensorType },
    #[error(
        "argument {index} of a function that is being compiled has no value yet: \
         return what you want to see"
    )]
    ArgumentValue { index: u32 },
    #[error("a placeholder of {ty} has no value: what is recorded on it can only be planned")]
    PlaceholderValue { ty: TensorType },
    #[error(
        "grad: the loss is a value in memory, which has forgotten how it was made, and so whether \
         from trainable {name}: record the gradients before the loss is evaluated, or evaluate \
         both together with eval_all"
    )]
    EvaluatedLoss { name: String },
    #[error("the compiled function was given {got} arguments, but donates argument {donated}")]
    DonatedArgument { donated: usize, got: usize },
    /// An adapter's configuration that does not fit the model.
    #[error("adapter: {0}")]
    Adapter(io::peft::Problem),
    /// Training data that cannot make a batch.
    #[error("training data: {0}")]
    Data(io::data::Problem),
    #[error(
        "{skipped} updates in a row were skipped, because loss or gradients were not finite (first \
         in {culprit}): look at the rows, or take a lower learning rate"
    )]
    NoUpdate { skipped: usize, culprit: String },
    #[error(
        "a step of {} x {} tokens wants {} beside what is loaded, and {device} has {} free: {}", of[0], of[1],
        Bytes(*wanted_bytes as u64), Bytes(*free_bytes as u64), smaller(*fits)
    )]
    StepMemory {
        device: Device,
        /// Rows and tokens of each.
        of: [usize; 2],
        wanted_bytes: usize,
        free_bytes: usize,
        /// A smaller step for which the memory suffices.
        fits: Option<[usize; 2]>,
    },
    #[error("a batch of {rows} rows cannot be dealt evenly to {ranks} ranks")]
    UnevenRows { rows: usize, ranks: usize },
    #[error(
        "rank {rank} does not train what the others do: start all with the same flags, data and model, and to go on, \
         from the same checkpoint"
    )]
    RanksDiffer { rank: usize },
    #[error("expected {expected} parameters, got {got}")]
    Parameters { expected: usize, got: usize },
    #[error(
        "the weight {tensor} has a NaN or an infinity: the model's file is damaged, or was made by a training \
         run that diverged; get another"
    )]
    WeightNotFinite { tensor: String },
    #[error(
        "the logits are NaN, although every weight of the model is finite: is the adapter damaged? with \
         weights in f16, load them as bf16"
    )]
    LogitsNotFinite,
    #[error("no adapter is called {name}: there are {known}")]
    UnknownAdapter { name: String, known: String },
    #[error("the adapter is for another base: it adapts {module}, which this model does not have")]
    AdapterModule { module: String },
    #[error(
        "the adapter is for another base: {module} is {expected:?} [out, in] here and {got:?} there"
    )]
    AdapterShape { module: String, expected: [usize; 2], got: [usize; 2] },
    #[error("rope scaling: expected {expected} divisors, one per pair of a head's dims, got {got}")]
    RopeDivisors { expected: usize, got: usize },
    #[error("the prompt has {tokens} tokens: expected 1 to {context}, the model's context")]
    PromptLength { tokens: usize, context: usize },
    #[error("texts of {got} tokens: the encoder has positions for {expected}")]
    TextLength { expected: usize, got: usize },
    #[error("expected one text at least, got none")]
    NoTexts,
    /// A setting of the sampling that no distribution has.
    #[error("{name}: expected {expected}, got {got}")]
    Sampling { name: &'static str, expected: &'static str, got: f64 },
    #[error("a stop string is empty: it would end every text before it begins")]
    EmptyStop,
    #[error(
        "{}: a GGUF file is made from a GGUF base: convert the folder with llama.cpp's \
         convert_hf_to_gguf.py first, or leave --export-gguf out for a fused folder", path.display()
    )]
    FuseFolderToGguf { path: PathBuf },
    #[error("weights cannot be held as {got}: expected f32, bf16 or f16")]
    BaseType { got: DType },
    #[error("weights are written as F32, F16 or BF16, not as {got}")]
    FuseType { got: DType },
    #[error("{weight} merged with the adapter holds {got}: is one of them damaged?")]
    FusedNotFinite { weight: String, got: f32 },
    #[error("{}: {file} lies here already: choose another folder", path.display())]
    FuseOccupied { path: PathBuf, file: &'static str },
    #[error("a cache of {dims:?} values per layer cannot be addressed")]
    CacheSize { dims: Vec<usize> },
}

impl ErrorKind {
    /// Whether a line of the caller's made it: with the others a file, a setting or a text is the matter.
    fn is_of_code(&self) -> bool {
        matches!(
            self,
            ErrorKind::Graph(_)
                | ErrorKind::Runtime(_)
                | ErrorKind::Candle(_)
                | ErrorKind::DeviceMismatch { .. }
                | ErrorKind::DataLength { .. }
                | ErrorKind::NotAScalar { .. }
                | ErrorKind::ArgumentValue { .. }
                | ErrorKind::PlaceholderValue { .. }
                | ErrorKind::EvaluatedLoss { .. }
                | ErrorKind::DonatedArgument { .. }
        )
    }
}

impl Error {
    /// What went wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// The caller's line.
    pub fn location(&self) -> &'static Location<'static> {
        self.location
    }

    /// The same mistake, made at another line.
    pub(crate) fn moved_to(self, location: &'static Location<'static>) -> Error {
        Error { location, ..self }
    }

    pub(crate) fn at(kind: impl Into<ErrorKind>, location: &'static Location<'static>) -> Error {
        Error { kind: Box::new(kind.into()), location }
    }
}

/// Turns an error of any layer into one that names the caller of the public method.
pub(crate) trait AtCaller<T> {
    #[track_caller]
    fn at_caller(self) -> Result<T>;
}

impl<T, E: Into<ErrorKind>> AtCaller<T> for std::result::Result<T, E> {
    #[track_caller]
    fn at_caller(self) -> Result<T> {
        let location = Location::caller();
        self.map_err(|e| Error::at(e, location))
    }
}

macro_rules! from_kind {
    ($($source:ty),*) => {$(
        impl From<$source> for Error {
            #[track_caller]
            fn from(e: $source) -> Error {
                Error::at(e, Location::caller())
            }
        }
    )*};
}

from_kind!(
    ErrorKind,
    metal_candle_graph::Error,
    metal_candle_runtime::Error,
    io::Error,
    candle_core::Error
);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        match self.kind.is_of_code() {
            true => write!(f, " (at {}:{})", self.location.file(), self.location.line()),
            false => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {}", self.kind, self.location)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.kind)
    }
}

fn smaller(fits: Option<[usize; 2]>) -> String {
    match fits {
        Some([batch, seq]) => format!("{batch} x {seq} would fit (batch size, length of the rows)"),
        None => "not even one short row fits; take a smaller model, or one in blocks".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LazyTensor;

    #[test]
    fn a_message_has_a_line_where_code_is_to_be_mended() {
        let x = LazyTensor::zeros(&[2], DType::F32, &Device::Cpu).unwrap();
        let error = x.reshape(&[3]).unwrap_err();
        assert!(error.to_string().contains(&format!("{}:", file!())), "{error}");
        let error = Error::from(ErrorKind::EmptyStop);
        assert_eq!(error.to_string(), error.kind().to_string());
    }
}
