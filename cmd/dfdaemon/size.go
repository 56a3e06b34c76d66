package main

import (
	"errors"
	"math"
	"strconv"
	"strings"
)

// size is a number of bytes, as the value of a flag.
type size int64

// sizeUnits are what may follow the number.
var sizeUnits = map[string]int64{
	"": 1, "B": 1,
	"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
	"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
}

// String is for pflag.
func (s *size) String() string { return strconv.FormatInt(int64(*s), 10) }

// Type is for pflag.
func (s *size) Type() string { return "size" }

// Set is for pflag.
func (s *size) Set(text string) error {
	number := strings.TrimRight(text, "BKMGTi")
	factor, known := sizeUnits[strings.TrimSpace(text[len(number):])]
	n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return errors.New("out of range")
	case err != nil || !known:
		return errors.New(
			"want a whole number of bytes, or one with a unit such as 500GiB: KiB, MiB, GiB, TiB, KB, MB, GB or TB")
	case n > uint64(math.MaxInt64/factor):
		return errors.New("out of range")
	}
	*s = size(int64(n) * factor)
	return nil
}
