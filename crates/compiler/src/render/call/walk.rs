//! Elements in row-major order, and where some operands have them.

use crate::Layout;

/// A walk over `dims`, and per operand the place of every element.
pub(super) struct Walk {
    dims: Vec<usize>,
    places: Vec<Affine>,
}

struct Affine {
    name: &'static str,
    offset: isize,
    strides: Vec<isize>,
}

impl Walk {
    pub(super) fn over(dims: &[usize]) -> Walk {
        Walk { dims: dims.to_vec(), places: Vec::new() }
    }

    /// The function `name` gives `offset + Σ index·stride`.
    pub(super) fn place(mut self, name: &'static str, strides: &[isize], offset: isize) -> Walk {
        assert_eq!(strides.len(), self.dims.len(), "metal-candle bug: strides of another rank");
        self.places.push(Affine { name, offset, strides: strides.to_vec() });
        self
    }

    /// The function `name` gives the place in `layout`, whose shape is the walk's.
    pub(super) fn layout(self, name: &'static str, layout: &Layout) -> Walk {
        self.place(name, layout.strides(), layout.offset)
    }

    pub(super) fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Dims that every operand walks as one become one; none of extent 1 are left.
    pub(super) fn collapsed(self) -> Walk {
        let mut out = Walk { dims: Vec::new(), places: Vec::new() };
        let bare = |a: &Affine| Affine { strides: Vec::new(), ..*a };
        out.places = self.places.iter().map(bare).collect();
        for d in (0..self.dims.len()).filter(|d| self.dims[*d] != 1) {
            let extent = self.dims[d];
            let mut pairs = out.places.iter().zip(&self.places);
            let one = pairs.all(|(to, from)| {
                to.strides.last().is_some_and(|outer| *outer == from.strides[d] * extent as isize)
            });
            if one {
                *out.dims.last_mut().expect("an outer dim") *= extent;
            } else {
                out.dims.push(extent);
            }
            for (to, from) in out.places.iter_mut().zip(&self.places) {
                if one {
                    to.strides.pop();
                }
                to.strides.push(from.strides[d]);
            }
        }
        out
    }

    /// The most neighbours, up to `most`, that lie beside each other in every operand of `moved`, at a multiple of their
    /// number, and are one to the others; every one of `steps` is a multiple of it.
    pub(super) fn vector(&self, moved: &[&str], steps: &[isize], most: usize) -> usize {
        let Some((extent, last)) = self.dims.last().zip(self.dims.len().checked_sub(1)) else {
            return 1;
        };
        let fits = |n: usize| {
            let multiple = |x: &isize| x.unsigned_abs().is_multiple_of(n);
            let together = |a: &Affine| match moved.contains(&a.name) {
                true => {
                    a.strides[last] == 1
                        && multiple(&a.offset)
                        && a.strides[..last].iter().all(multiple)
                }
                false => a.strides[last] == 0,
            };
            extent.is_multiple_of(n)
                && self.places.iter().all(together)
                && steps.iter().all(multiple)
        };
        let mut n = most;
        while n > 1 && !fits(n) {
            n /= 2;
        }
        n.max(1)
    }

    /// The same walk in steps of `n` elements. Places of `moved` count such steps if `units`, else still elements.
    pub(super) fn by(mut self, n: usize, moved: &[&str], units: bool) -> Walk {
        if n == 1 {
            return self;
        }
        let last = self.dims.len() - 1;
        self.dims[last] /= n;
        for a in self.places.iter_mut().filter(|a| moved.contains(&a.name)) {
            a.strides[last] *= n as isize;
            if units {
                a.offset /= n as isize;
                a.strides.iter_mut().for_each(|stride| *stride /= n as isize);
            }
        }
        self
    }

    /// Whether every element's place in `name` is a multiple of `n`.
    pub(super) fn starts_at_multiples(&self, name: &str, n: usize) -> bool {
        let multiple = |x: &isize| x.unsigned_abs().is_multiple_of(n);
        let of = |a: &Affine| multiple(&a.offset) && a.strides.iter().all(multiple);
        self.places.iter().filter(|a| a.name == name).all(of)
    }

    /// The largest number that any place is made of.
    pub(super) fn reach(&self) -> usize {
        let of = |a: &Affine| {
            a.strides.iter().zip(&self.dims).fold(
                a.offset.unsigned_abs(),
                |sum, (stride, extent)| {
                    sum.saturating_add(stride.unsigned_abs().saturating_mul(*extent))
                },
            )
        };
        self.places.iter().map(of).fold(self.len(), usize::max)
    }

    /// A function for each operand: from the number of an element to its place.
    pub(super) fn functions(&self) -> Vec<String> {
        let function = |a: &Affine| format!("FN I {}(I i) {{ return {}; }}", a.name, self.text(a));
        self.places.iter().map(function).collect()
    }

    /// `offset + Σ index·stride`; dims that this operand walks as one need no division.
    fn text(&self, a: &Affine) -> String {
        let mut dims: Vec<(usize, isize)> = Vec::new();
        for (extent, stride) in self.dims.iter().zip(&a.strides) {
            match dims.last_mut() {
                Some(outer) if outer.1 == stride * *extent as isize => {
                    *outer = (outer.0 * extent, *stride);
                }
                _ => dims.push((*extent, *stride)),
            }
        }
        let (mut terms, mut inner) = (Vec::new(), 1usize);
        for (d, (extent, stride)) in dims.into_iter().enumerate().rev() {
            // Of nothing, no index is computed; but the text must not divide by 0.
            let extent = extent.max(1);
            let from = if inner == 1 { "i".into() } else { format!("i / {inner}") };
            let index = if d == 0 { from } else { format!("{from} % {extent}") };
            match stride {
                0 => {}
                1 => terms.push(index),
                stride => terms.push(format!("{index} * I({stride})")),
            }
            inner = inner.saturating_mul(extent);
        }
        if a.offset != 0 || terms.is_empty() {
            terms.push(format!("I({})", a.offset));
        }
        terms.reverse();
        terms.join(" + ")
    }
}
