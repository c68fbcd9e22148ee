//! Whether the ratios of a chain's stages multiply, and what becomes of their losses.

use crate::codec::registry::method;
use crate::error::Result;
use crate::stats::rounded;
use crate::tables::Columns;
use serde::Serialize;

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

/// The chains of a sweep.csv whose parts it has too, packed alike.
pub fn products(table: &Columns) -> Result<Vec<Product>> {
    let packing: Vec<Vec<String>> =
        ["block_size", "batch", "first_token"].iter().map(|c| table.strings(c)).collect::<Result<_>>()?;
    let packed = |i: usize| packing.iter().map(|column| column[i].clone()).collect::<Vec<_>>();
    let chain = table.strings("method")?;
    let (cr, kl) = (table.floats("cr_audited")?, table.floats("kl")?);
    let find =
        |text: &str, like: usize| (0..chain.len()).find(|&i| chain[i] == text && packed(i) == packed(like));
    let product = |i: usize| -> Option<Product> {
        let known =
            |stage: &&str| method(stage.split(':').next().unwrap_or_default()).is_some_and(|m| m.lossless);
        let (lossless, lossy): (Vec<&str>, Vec<&str>) = chain[i].split('+').partition(known);
        if lossy.len() < 2 || lossless.is_empty() {
            return None;
        }
        let base = cr[find(&lossless.join("+"), i)?];
        let parts: Vec<usize> = lossy
            .iter()
            .map(|part| find(&[&lossless[..], &[*part]].concat().join("+"), i))
            .collect::<Option<_>>()?;
        let cr_product = parts.iter().map(|&p| cr[p] / base).product::<f64>() * base;
        let kl_sum: f64 = parts.iter().map(|&p| kl[p]).sum();
        Some(Product {
            method: chain[i].clone(),
            cr: cr[i],
            cr_product: rounded(cr_product),
            share: rounded(cr[i] / cr_product),
            kl: kl[i],
            kl_sum: rounded(kl_sum),
            kl_share: rounded(kl[i] / kl_sum),
        })
    };
    Ok((0..chain.len()).filter_map(product).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn gains_are_held_against_their_product() {
        let text = "method,block_size,batch,first_token,cr_audited,kl\n\
            prefix,16,64,fused,2,0\nprefix+bff:tau=0.9,16,64,fused,3,0.1\nprefix+kivi:bits=4,16,64,fused,8,0.02\n\
            prefix+bff:tau=0.9+kivi:bits=4,16,64,fused,9,0.15\nprefix+bff:tau=0.8+kivi:bits=4,16,64,fused,9,0.15\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sweep.csv");
        std::fs::write(&path, text).unwrap();
        let found = products(&Columns::read(Path::new(&path)).unwrap()).unwrap();
        assert_eq!(found.len(), 1, "the other chain's parts are not there");
        assert_eq!((found[0].cr_product, found[0].share), (12.0, 0.75));
        assert!((found[0].kl_share - 1.25).abs() < 1e-5);
    }
}
