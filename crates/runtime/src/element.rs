//! The Rust types behind [`DType`], and the typed vectors that buffers own.

use crate::pages::prefer_huge;
use crate::{Error, Result};
use candle_core::Tensor;
use half::{bf16, f16};
use metal_candle_graph::{DType, Shape};
use std::alloc::Layout;

/// A Rust type that is the element of a tensor: `u8`, `u32`, `i64`, `bf16`, `f16`, `f32` or `f64`.
pub trait Element: private::Sealed + Copy + Default + Send + Sync + 'static {
    const DTYPE: DType;
}

mod private {
    use super::Data;

    pub trait Sealed: Sized {
        fn wrap(data: Vec<Self>) -> Data;
        fn view(data: &Data) -> Option<&[Self]>;
        fn unwrap(data: Data) -> std::result::Result<Vec<Self>, Data>;
    }
}

/// Declares [`Data`] and what must be said once for every element type.
macro_rules! elements {
    ($($variant:ident: $ty:ty),* $(,)?) => {
        /// The elements of a buffer, in the vector that a Candle tensor takes over without a copy.
        pub enum Data { $($variant(Vec<$ty>)),* }

        $(
            impl Element for $ty {
                const DTYPE: DType = DType::$variant;
            }
            impl private::Sealed for $ty {
                fn wrap(data: Vec<Self>) -> Data {
                    Data::$variant(data)
                }
                fn view(data: &Data) -> Option<&[Self]> {
                    match data {
                        Data::$variant(data) => Some(data),
                        _ => None,
                    }
                }
                fn unwrap(data: Data) -> std::result::Result<Vec<Self>, Data> {
                    match data {
                        Data::$variant(data) => Ok(data),
                        other => Err(other),
                    }
                }
            }
        )*

        impl Data {
            pub(crate) fn dtype(&self) -> DType {
                match self { $(Data::$variant(_) => DType::$variant),* }
            }

            pub(crate) fn len(&self) -> usize {
                match self { $(Data::$variant(data) => data.len()),* }
            }

            pub(crate) fn as_ptr(&self) -> *const u8 {
                match self { $(Data::$variant(data) => data.as_ptr().cast()),* }
            }

            pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
                match self { $(Data::$variant(data) => data.as_mut_ptr().cast()),* }
            }

            /// No elements yet, and room for `len`.
            pub(crate) fn with_capacity(dtype: DType, len: usize) -> Option<Data> {
                match dtype {
                    $(DType::$variant => {
                        let mut data: Vec<$ty> = Vec::new();
                        data.try_reserve_exact(len).ok()?;
                        Some(Data::$variant(data))
                    })*
                }
            }

            pub(crate) fn zeroed(dtype: DType, len: usize) -> Option<Data> {
                match dtype { $(DType::$variant => zeroed::<$ty>(len).map(Data::$variant)),* }
            }

            /// # Safety
            /// The first `len` elements have been written, and there is room for them.
            pub(crate) unsafe fn set_len(&mut self, len: usize) {
                match self {
                    // SAFETY: the caller's promise is that of `Vec::set_len`.
                    $(Data::$variant(data) => unsafe { data.set_len(len) }),*
                }
            }

            pub(crate) fn copied(&self) -> Data {
                match self {
                    $(Data::$variant(data) => {
                        let mut copy: Vec<$ty> = Vec::with_capacity(data.len());
                        prefer_huge(copy.as_mut_ptr().cast(), self.size_bytes());
                        copy.extend_from_slice(data);
                        Data::$variant(copy)
                    })*
                }
            }

            pub(crate) fn into_tensor(self, shape: &Shape) -> Result<Tensor> {
                let cpu = &candle_core::Device::Cpu;
                match self {
                    $(Data::$variant(data) => Ok(Tensor::from_vec(data, shape.dims(), cpu)?)),*
                }
            }
        }
    };
}

elements! { U8: u8, U32: u32, I64: i64, BF16: bf16, F16: f16, F32: f32, F64: f64 }

impl Data {
    pub(crate) fn new<T: Element>(data: Vec<T>) -> Data {
        T::wrap(data)
    }

    pub(crate) fn as_slice<T: Element>(&self) -> Result<&[T]> {
        T::view(self).ok_or(Error::DType { expected: T::DTYPE, got: self.dtype() })
    }

    pub(crate) fn into_vec<T: Element>(self) -> Result<Vec<T>> {
        T::unwrap(self).map_err(|data| Error::DType { expected: T::DTYPE, got: data.dtype() })
    }

    /// No elements, in no memory.
    pub(crate) fn empty() -> Data {
        Data::new(Vec::<u8>::new())
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.len() * self.dtype().size_bytes()
    }

    /// The elements' bytes, in the machine's order.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub(crate) fn as_bytes(&self) -> &[u8] {
        let len = self.size_bytes();
        // SAFETY: so many bytes of initialised numbers, which have no padding.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), len) }
    }
}

/// `len` zeros, or `None` where there is no memory: `vec![0; len]` would abort.
fn zeroed<T: Element>(len: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(len).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout has a size. Zero bytes are a value of every element type, and `Vec` frees with the
    // layout of `len` elements, which is this one.
    unsafe {
        let data = std::alloc::alloc_zeroed(layout);
        (!data.is_null()).then(|| Vec::from_raw_parts(data.cast(), len, len))
    }
}
