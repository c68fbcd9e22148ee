//! Whether the ratios of a chain's stages multiply, and what becomes of their losses.

use crate::codec::registry::method;
use crate::error::Result;
use crate::stats::rounded;
use crate::tables::Table;
use polars::prelude::{DataType, Expr, JoinArgs, JoinType, MaintainOrderJoin, col, lit};
use serde::{Deserialize, Serialize};

/// A chain of several lossy stages beside its parts, each after the chain's lossless stages alone: one row of products.csv.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Product {
    pub method: String,
    pub cr: f64,
    /// The lossless stages' ratio times what each part gains over it by itself.
    pub cr_product: f64,
    /// `cr / cr_product`: 1 where gains multiply.
    pub share: f64,
    /// Nats a token.
    pub kl: f64,
    /// Of the parts.
    pub kl_sum: f64,
    pub kl_share: f64,
}

/// A lossy stage of a chain.
#[derive(Serialize)]
struct Part {
    method: String,
    /// The chain's lossless stages, alone and before this one.
    base: String,
    part: String,
}

/// The parts of a chain of several lossy stages after lossless ones; none of another.
fn parts(chain: &str) -> Vec<Part> {
    let known =
        |stage: &&str| method(stage.split(':').next().unwrap_or_default()).is_some_and(|m| m.lossless);
    let (lossless, lossy): (Vec<&str>, Vec<&str>) = chain.split('+').partition(known);
    if lossy.len() < 2 || lossless.is_empty() {
        return Vec::new();
    }
    let base = lossless.join("+");
    let of =
        |stage: &&str| Part { method: chain.to_owned(), base: base.clone(), part: format!("{base}+{stage}") };
    lossy.iter().map(of).collect()
}

/// The chains of a sweep.csv whose parts it has too, packed alike.
pub fn products(table: &Table) -> Result<Vec<Product>> {
    /// A chain with what its parts did.
    #[derive(Deserialize)]
    struct Found {
        method: String,
        cr: f64,
        cr_base: f64,
        gains: Vec<f64>,
        kl: f64,
        kl_sum: f64,
    }
    let mut chains = table.strings("method")?;
    chains.sort();
    chains.dedup();
    let parts: Vec<Part> = chains.iter().flat_map(|chain| parts(chain)).collect();
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    let parts = table.sibling(&parts)?;
    // An arm is known by its chain and how caches are packed.
    let arm = |chain: &str| [chain, "block_size", "batch", "first_token"].map(col);
    let like = |how: JoinType| JoinArgs {
        nulls_equal: true,
        maintain_order: MaintainOrderJoin::Left,
        ..JoinArgs::new(how)
    };
    // A CSV file has whole numbers where a column happens to hold no others.
    let number = |column: &str| col(column).cast(DataType::Float64);
    let numbers = |suffix: &str| -> [Expr; 2] {
        [("cr_audited", "cr"), ("kl", "kl")]
            .map(|(column, name)| number(column).alias(format!("{name}{suffix}")))
    };
    let found = table.query(|rows| {
        let measured = |suffix: &str| rows.clone().select([&arm("method")[..], &numbers(suffix)].concat());
        measured("")
            .join(parts.lazy(), [col("method")], [col("method")], like(JoinType::Inner))
            .join(measured("_base"), arm("base"), arm("method"), like(JoinType::Inner))
            .join(measured("_part"), arm("part"), arm("method"), like(JoinType::Left))
            .group_by_stable(arm("method"))
            .agg([
                col("cr").first(),
                col("cr_base").first(),
                (col("cr_part") / col("cr_base")).alias("gains"),
                col("kl").first(),
                col("kl_part").sum().alias("kl_sum"),
                col("cr_part").null_count().alias("missing"),
            ])
            .filter(col("missing").eq(lit(0)))
    })?;
    let product = |f: Found| {
        let cr_product = f.gains.iter().product::<f64>() * f.cr_base;
        Product {
            method: f.method,
            cr: f.cr,
            cr_product: rounded(cr_product),
            share: rounded(f.cr / cr_product),
            kl: f.kl,
            kl_sum: rounded(f.kl_sum),
            kl_share: rounded(f.kl / f.kl_sum),
        }
    };
    Ok(found.rows()?.into_iter().map(product).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gains_are_held_against_their_product() {
        let text = "method,block_size,batch,first_token,cr_audited,kl\n\
            prefix,16,64,fused,2,0\nprefix+bff:tau=0.9,16,64,fused,3,0.1\nprefix+kivi:bits=4,16,64,fused,8,0.02\n\
            prefix+bff:tau=0.9+kivi:bits=4,16,64,fused,9,0.15\nprefix+bff:tau=0.8+kivi:bits=4,16,64,fused,9,0.15\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sweep.csv");
        std::fs::write(&path, text).unwrap();
        let found = products(&Table::read(&path).unwrap()).unwrap();
        assert_eq!(found.len(), 1, "the other chain's parts are not there");
        assert_eq!((found[0].cr_product, found[0].share), (12.0, 0.75));
        assert!((found[0].kl_share - 1.25).abs() < 1e-5);
    }
}
