"""From text to segments of tokens: corpora -> tokenizers -> encoding -> streams, in this order."""
