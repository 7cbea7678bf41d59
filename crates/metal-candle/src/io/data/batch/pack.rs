//! Several documents to a row.

use std::collections::BTreeSet;

/// Packs `documents` (each what it is called and its columns) into rows of at most `capacity`
/// columns: the longest first, each into the fullest row that has room for it (best fit
/// decreasing). How full the rows get depends on the lengths alone, not on their order.
pub(super) fn best_fit(mut documents: Vec<(usize, usize)>, capacity: usize) -> Vec<Vec<usize>> {
    documents.sort_by_key(|(_, columns)| std::cmp::Reverse(*columns));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Columns left, and the row's number.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for (document, columns) in documents {
        let fullest = open.range((columns, 0)..).next().copied();
        let (left, row) = fullest.unwrap_or_else(|| {
            rows.push(Vec::new());
            (capacity, rows.len() - 1)
        });
        open.remove(&(left, row));
        open.insert((left - columns, row));
        rows[row].push(document);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::best_fit;

    #[test]
    fn every_document_is_in_one_row_and_no_row_is_overfull() {
        let lengths: Vec<usize> = (0..500).map(|i| 1 + i * i * 7 % 90).collect();
        let documents = || lengths.iter().copied().enumerate().collect::<Vec<_>>();
        let rows = best_fit(documents(), 128);
        let mut seen: Vec<usize> = rows.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..500).collect::<Vec<_>>());
        let fill = |rows: &[Vec<usize>]| {
            let mut fill: Vec<usize> =
                rows.iter().map(|row| row.iter().map(|&i| lengths[i]).sum()).collect();
            fill.sort_unstable();
            fill
        };
        assert!(fill(&rows).iter().all(|&columns| columns <= 128));
        let least = lengths.iter().sum::<usize>().div_ceil(128);
        assert!(rows.len() <= least + 1, "{} rows, at least {least}", rows.len());
        let mut reversed = documents();
        reversed.reverse();
        assert_eq!(fill(&best_fit(reversed, 128)), fill(&rows));
    }
}
