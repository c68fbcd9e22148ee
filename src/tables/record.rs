//! A table's row as a record of some type (serde): a field a column of its name.

use polars::prelude::*;
use serde::de::value::SeqDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;
use std::fmt;

/// Why a row is no such record: a column that is not there or holds something else.
#[derive(Debug)]
pub struct Unusable {
    pub column: String,
    /// It holds a number that no table of kvfuse holds.
    pub infinite: bool,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "column '{}'", self.column)
    }
}

impl std::error::Error for Unusable {}

impl de::Error for Unusable {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Unusable { column: String::new(), infinite: false }
    }

    fn missing_field(field: &'static str) -> Self {
        Unusable { column: field.to_owned(), infinite: false }
    }
}

/// The row of a number.
pub struct Row<'a> {
    columns: std::slice::Iter<'a, Column>,
    row: usize,
    at: Option<&'a Column>,
}

impl<'a> Row<'a> {
    pub fn of(columns: &'a [Column], row: usize) -> Self {
        Row { columns: columns.iter(), row, at: None }
    }
}

impl<'de> Deserializer<'de> for Row<'de> {
    type Error = Unusable;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Row<'de> {
    type Error = Unusable;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Unusable> {
        self.at = self.columns.next();
        let name = |column: &'de Column| seed.deserialize(column.name().as_str().into_deserializer());
        self.at.map(name).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Unusable> {
        let Some(column) = self.at else { return Err(de::Error::custom("a value without a key")) };
        // The row is there: columns are of one length.
        let cell = Cell(column.get(self.row).unwrap_or(AnyValue::Null));
        seed.deserialize(cell).map_err(|e| Unusable { column: column.name().to_string(), ..e })
    }
}

/// One cell. Where it is empty a number is NaN, a text and a list are empty, an option is none.
struct Cell<'a>(AnyValue<'a>);

impl Cell<'_> {
    fn text(&self) -> String {
        match (&self.0, self.0.get_str()) {
            (AnyValue::Null, _) => String::new(),
            (_, Some(text)) => text.to_owned(),
            (AnyValue::Float64(x), _) => format!("{x:?}"),
            (other, _) => other.to_string(),
        }
    }
}

impl<'de> Deserializer<'de> for Cell<'de> {
    type Error = Unusable;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        match &self.0 {
            AnyValue::Null => visitor.visit_unit(),
            AnyValue::Boolean(x) => visitor.visit_bool(*x),
            AnyValue::String(_) | AnyValue::StringOwned(_) => visitor.visit_string(self.text()),
            AnyValue::List(list) => {
                let cells =
                    (0..list.len()).map(|i| Cell(list.get(i).unwrap_or(AnyValue::Null).into_static()));
                visitor.visit_seq(SeqDeserializer::new(cells))
            }
            number => match number.extract::<f64>() {
                Some(x) if x.is_infinite() => Err(Unusable { column: String::new(), infinite: true }),
                // A count that was averaged or read from a CSV file may be written as 3.0.
                Some(x) if x >= 0.0 && x.fract() == 0.0 => visitor.visit_u64(x as u64),
                Some(x) => visitor.visit_f64(x),
                None => Err(de::Error::custom("no number")),
            },
        }
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        match self.0 {
            AnyValue::Null => visitor.visit_f64(f64::NAN),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        match self.0 {
            AnyValue::Null => {
                visitor.visit_seq(SeqDeserializer::<_, Unusable>::new(std::iter::empty::<Cell>()))
            }
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        visitor.visit_string(self.text())
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        match self.0 {
            AnyValue::Null => visitor.visit_none(),
            AnyValue::Float64(x) if x.is_nan() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unusable> {
        self.text().into_deserializer().deserialize_enum(name, variants, visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unusable> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 char str bytes byte_buf unit unit_struct newtype_struct tuple
        tuple_struct map struct identifier
    }
}

impl<'de> IntoDeserializer<'de, Unusable> for Cell<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
