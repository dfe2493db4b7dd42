//! Columns of text, as wide as they have to be.

use std::fmt;

use clap::ValueEnum;

/// How what is listed is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

pub struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub fn new(titles: &[&str; N]) -> Self {
        Self { rows: vec![titles.map(str::to_owned)] }
    }

    pub fn row(&mut self, cells: [&str; N]) {
        self.rows.push(cells.map(str::to_owned));
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: [usize; N] =
            std::array::from_fn(|i| self.rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
        for row in &self.rows {
            for (i, (cell, width)) in row.iter().zip(widths).enumerate() {
                // Nothing at the end of a line needs padding.
                if i + 1 == N { writeln!(f, "{cell}")? } else { write!(f, "{cell:width$}  ")? }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let mut table = Table::new(&["A", "LONG", "END"]);
        table.row(["wider", "x", "y"]);
        assert_eq!(table.to_string(), "A      LONG  END\nwider  x     y\n");
    }
}
